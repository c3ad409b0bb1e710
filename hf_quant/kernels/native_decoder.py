"""The fused decoder of the native library: its structures, and the call that runs all layers for new tokens."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from functools import cache

from hf_quant.kernels import native_library
from hf_quant.kernels.native import NativePrepared
from hf_quant.kernels.native_library import Weight

ABI = 3
POSITION, MASKED = 100, 101  # codes of csrc/decoder_abi.h
HEAD_DIM_STEP, MAX_HEAD_DIM = 16, 256
FEW_TOKENS = 64  # attention of many tokens is written for AVX-512 only; elsewhere it takes one query after the other


class Projection(ctypes.Structure):
    """``hfq_projection``: a weight, its bias or none, and what happens to its activations."""

    _fields_ = [("weight", POINTER(Weight)), ("bias", c_void_p), ("mode", c_int32), ("reserved", c_int32)]


class Layer(ctypes.Structure):
    """``hfq_decoder_layer``."""

    _fields_ = [
        *((name, Projection) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, c_float) for name in ("input_eps", "post_eps", "q_eps", "k_eps", "scaling")),
        ("rotary", c_int32),
    ]


class Decoder(ctypes.Structure):
    """``hfq_decoder``."""

    _fields_ = [
        ("dtype", c_int32),
        ("count", c_int32),
        *((name, c_int64) for name in ("hidden", "intermediate", "heads", "kv_heads", "head_dim")),
        ("layers", POINTER(Layer)),
        ("final_norm", c_void_p),
        ("final_eps", c_float),
        ("reserved", c_int32),
    ]


class Step(ctypes.Structure):
    """``hfq_step``."""

    _fields_ = [
        ("rows", c_int64),
        ("news", c_int64),
        ("x", c_void_p),
        ("y", c_void_p),
        ("positions", c_void_p),
        ("position_stride", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("table_rows", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("past", c_int64),
        ("mask", c_void_p),
        ("mask_stride", c_int64),
        ("mask_bytes", c_int32),
        ("reserved", c_int32),
        ("lengths", c_void_p),
    ]


def unavailable() -> str | None:
    """Why no model can run fused on this machine; None when one can."""
    return native_library.unavailable() or _load()[1]


def entry() -> Callable[..., int]:
    """``hfq_decode(decoder, step, threads)``; only where :func:`unavailable` says None."""
    found = _load()[0]
    assert found is not None
    return found[0]


def most_tokens() -> int:
    """New tokens (times rows) of one forward that the library runs as fast as torch would, or faster."""
    return sys.maxsize if native_library.variant() == "avx512" else FEW_TOKENS


def float_linear() -> Callable[..., int]:
    """``hfq_float_linear``, the product with a float weight; only where :func:`unavailable` says None."""
    found = _load()[0]
    assert found is not None
    return found[1]


def projection(prepared: NativePrepared, bias: int | None) -> Projection:
    """A weight that the caller keeps alive, and the address of its bias."""
    return Projection(ctypes.pointer(prepared.described.weight), bias, prepared.mode, 0)


@cache
def _load() -> tuple[tuple[Callable[..., int], Callable[..., int]] | None, str | None]:
    library = ctypes.CDLL(str(native_library.PATH))  # loaded before: the same handle
    try:
        version, decode, product = library.hfq_decoder_abi, library.hfq_decode, library.hfq_float_linear
    except AttributeError:
        return None, f"{native_library.PATH.name} has no fused decoder; `python -m hf_quant.kernels.build` compiles it"
    version.restype, version.argtypes = c_int32, ()
    if version() != ABI:
        return None, (
            f"the fused decoder of {native_library.PATH.name} is of another version of hf-quant "
            f"(ABI {version()}, not {ABI}); `python -m hf_quant.kernels.build` compiles it again"
        )
    decode.restype, decode.argtypes = c_int32, (c_void_p, c_void_p, c_int32)
    product.restype = c_int32
    product.argtypes = (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64)
    product.argtypes += (c_int32, c_int32)
    return (decode, product), None
