"""The compiled library of native CPU kernels, reached through its C ABI: load it once, or say why it cannot be used."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch  # first: the library shares the OpenMP runtime, and with it the threads, that torch has loaded

from hf_quant.errors import ConfigError, KernelError
from hf_quant.kernels import build

VARIABLE = "HF_QUANT_NATIVE"
OFF = "off"
VARIANTS = ("avx512", "avx2", "portable")
ABI = 2
_OMP_PAUSE_HARD = 2
PATH = Path(__file__).with_name("_native.so")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of activations, biases, outputs and scales


class Weight(ctypes.Structure):
    """``hfq_weight`` of ``csrc/hf_quant.h``: sizes, and pointers into tensors that somebody else keeps alive."""

    _fields_ = [
        ("table_grid", c_int32),
        ("bits", c_int32),
        ("scale_type", c_int32),
        ("reserved", c_int32),
        ("out", c_int64),
        ("in_", c_int64),
        ("group", c_int64),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("table", c_void_p),
    ]


class Functions(NamedTuple):
    """The entries of the library, with their prototypes; those that return a code are passed through :func:`check`."""

    linear: Callable[..., int]
    codes_bytes: Callable[[int, int, int], int]
    pack: Callable[..., int]
    unpack: Callable[..., int]
    dequantize: Callable[..., int]
    gather_rows: Callable[..., int]
    variant: Callable[[], bytes]
    set_variant: Callable[[bytes], int]
    status: Callable[[], int]
    error: Callable[[int], bytes]
    abi: Callable[[], int]


_PROTOTYPES: dict[str, tuple[object, tuple[object, ...]]] = {
    "linear": (
        c_int32,
        (c_void_p, c_int32, c_void_p, c_int64, c_int64, c_int32, c_void_p, c_void_p, c_void_p, c_int32, c_int32),
    ),
    "codes_bytes": (c_int64, (c_int64, c_int64, c_int32)),
    "pack": (c_int32, (c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int32)),
    "unpack": (c_int32, (c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int32)),
    "dequantize": (c_int32, (c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int32, c_int32)),
    "gather_rows": (c_int32, (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int32, c_int32)),
    "variant": (c_char_p, ()),
    "set_variant": (c_int32, (c_char_p,)),
    "status": (c_int32, ()),
    "error": (c_char_p, (c_int32,)),
    "abi": (c_int32, ()),
}


def functions() -> Functions:
    """The entries of the library.

    Raises:
        KernelError: it cannot be used; :func:`unavailable` is the reason.
    """
    found, reason = _load()
    if found is None:
        raise KernelError(f"the native CPU kernels cannot be used: {reason}.", "kernel=auto takes another kernel.")
    return found


def unavailable() -> str | None:
    """Why the library cannot be used on this machine, in one clause; None when it can."""
    return _load()[1]


def switched_off() -> bool:
    """Whether the user asked for no native kernels."""
    return os.environ.get(VARIABLE) == OFF


def variant() -> str:
    """The instruction set that runs: ``avx512``, ``avx2`` or ``portable``; raises KernelError without a library."""
    return functions().variant().decode()


def check(code: int) -> None:
    """Raise the KernelError that a returned code stands for; 0 is none."""
    if code:
        raise KernelError(
            f"the native CPU kernel refused a call: {functions().error(code).decode()}.",
            "this is a bug in hf-quant: please report it with the shape of the layer.",
        )


@cache
def _load() -> tuple[Functions | None, str | None]:
    wanted = os.environ.get(VARIABLE) or ""
    if wanted not in ("", OFF, *VARIANTS):
        raise ConfigError(
            f"{VARIABLE}={wanted!r} is not a variant of the native kernels.",
            f"choose one of {', '.join((*VARIANTS, OFF))}, or unset it.",
        )
    if wanted == OFF:
        return None, f"{VARIABLE}={OFF} switches it off"
    if not PATH.is_file():
        return None, _why_not_built()
    try:
        library = ctypes.CDLL(str(PATH))
        found = _entries(library)
    except (OSError, AttributeError) as error:
        return None, f"{PATH.name} does not load ({error}); `python -m hf_quant.kernels.build` compiles it again"
    if found.abi() != ABI:
        return None, (
            f"{PATH.name} was compiled from another version of hf-quant (ABI {found.abi()}, not {ABI}); "
            "`python -m hf_quant.kernels.build` compiles it again"
        )
    if status := found.status():
        return None, f"{found.error(status).decode()} ({VARIABLE}={wanted})"
    _survive_fork(library)
    return found, None


def _entries(library: ctypes.CDLL) -> Functions:
    entries = {}
    for name, (result, arguments) in _PROTOTYPES.items():
        entry = getattr(library, f"hfq_{name}")
        entry.restype, entry.argtypes = result, arguments
        entries[name] = entry
    return Functions(**entries)


def _why_not_built() -> str:
    again = "run `python -m hf_quant.kernels.build`"
    if build.compiler() is None:
        return f"it is not compiled, and there is no C++ compiler here (install one, such as g++, and {again})"
    return f"it was not compiled when hf-quant was installed ({again})"


def _survive_fork(library: ctypes.CDLL) -> None:
    """Let go of OpenMP's threads before a fork: GNU's waits forever in a child for those that only its parent has.

    That is so for torch's own operators, too. The next parallel call starts threads again.
    """
    pause = getattr(library, "omp_pause_resource_all", None) if sys.platform == "linux" else None
    if pause is not None and hasattr(os, "register_at_fork"):
        pause.restype, pause.argtypes = c_int32, (c_int32,)
        os.register_at_fork(before=lambda: pause(_OMP_PAUSE_HARD))
