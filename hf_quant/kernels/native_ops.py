"""The native CPU kernels as ``torch.ops.hf_quant`` operators: with fakes and gradients, for whatever traces a model.

A weight is passed as ``codes`` (tiled bytes), ``scale`` and ``zero`` (tiled, see :mod:`hf_quant.kernels.tiles`), its
grid (``int``, ``nf4``, ``fp4``), bits, output features, input features and group. In lists of zero
points and biases an empty tensor stands for none: gradients reach only lists that hold nothing but tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_int64, c_void_p
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from hf_quant.grids import GridName, levels
from hf_quant.kernels import memory
from hf_quant.kernels.native_library import DTYPES, Functions, Weight, check, functions


class Described(NamedTuple):
    """A weight as the library takes it; the tensors that it points into must outlive it.

    Attributes:
        weight: the structure itself.
        pointers: an array with its one address: ``const hfq_weight* const*``.
        out_stride: an array with one number, the distance of output rows that follow each other without a gap.
        library: the entries to call.
    """

    weight: Weight
    pointers: Any
    out_stride: Any
    library: Functions


def describe(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    grid: GridName,
    bits: int,
    out: int,
    in_features: int,
    group: int,
) -> Described:
    """The structure for a weight; made once for the same addresses and sizes."""
    return _describe(
        codes.data_ptr(),
        scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        DTYPES[scale.dtype],
        grid,
        bits,
        out,
        in_features,
        group,
    )


# Everything that is in the structure is in the key, so an entry stays right when its addresses are used again.
@lru_cache(maxsize=1 << 14)
def _describe(
    codes: int,
    scale: int,
    zero: int | None,
    scale_type: int,
    grid: GridName,
    bits: int,
    out: int,
    in_features: int,
    group: int,
) -> Described:
    table = None if grid == "int" else _table(grid).data_ptr()
    weight = Weight(int(table is not None), bits, scale_type, 0, out, in_features, group, codes, scale, zero, table)
    pointers = (POINTER(Weight) * 1)(ctypes.pointer(weight))
    return Described(weight, pointers, (c_int64 * 1)(out), functions())


@cache
def _table(grid: GridName) -> torch.Tensor:
    with torch.inference_mode(False):
        return levels(grid, "cpu").contiguous()


def pack(canonical: torch.Tensor, out: int, in_features: int, bits: int) -> torch.Tensor:
    """Canonical bytes of the codes -> tiled bytes ``[n]``, a little more of them where a tile is not full."""
    library = functions()
    tiled = memory.empty(library.codes_bytes(out, in_features, bits))
    source = canonical.contiguous()
    check(library.pack(source.data_ptr(), tiled.data_ptr(), out, in_features, bits, torch.get_num_threads()))
    return tiled


def unpack(tiled: torch.Tensor, out: int, in_features: int, bits: int) -> torch.Tensor:
    """The inverse of :func:`pack`: uint8 ``[out, in]`` (8 bits) or ``[out, ceil(in/2)]`` (4 bits)."""
    canonical = tiled.new_empty((out, in_features if bits == 8 else (in_features + 1) // 2))
    arguments = (tiled.data_ptr(), canonical.data_ptr(), out, in_features, bits, torch.get_num_threads())
    check(functions().unpack(*arguments))
    return canonical


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``x [..., in]`` as ``[rows, in]`` whose columns lie side by side; rows may be any distance apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


# --- what the operators do -------------------------------------------------------------------------------------------


def _linears(
    x: torch.Tensor,
    codes: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    zeros: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    grids: Sequence[GridName],
    bits: Sequence[int],
    outs: Sequence[int],
    groups: Sequence[int],
    mode: int,
) -> list[torch.Tensor]:
    rows, columns = rows_of(x), x.shape[-1]
    found = [x.new_empty((*x.shape[:-1], out)) for out in outs]
    if not rows.shape[0]:
        return found
    weights = [
        describe(code, scale, zero if zero.numel() else None, grid, width, out, columns, group)
        for code, scale, zero, grid, width, out, group in zip(
            codes, scales, zeros, grids, bits, outs, groups, strict=True
        )
    ]
    kept = [bias.to(x.dtype).contiguous() for bias in biases]
    count = len(outs)
    check(
        functions().linear(
            (POINTER(Weight) * count)(*(ctypes.pointer(each.weight) for each in weights)),
            count,
            rows.data_ptr(),
            rows.shape[0],
            rows.stride(0),
            DTYPES[x.dtype],
            (c_void_p * count)(*(y.data_ptr() for y in found)),
            (c_int64 * count)(*outs),
            (c_void_p * count)(*(bias.data_ptr() if bias.numel() else None for bias in kept)),
            mode,
            torch.get_num_threads(),
        )
    )
    return found


def _linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    grid: GridName,
    bits: int,
    out: int,
    in_features: int,
    group: int,
    bias: torch.Tensor | None,
    mode: int,
) -> torch.Tensor:
    # the short way: a compiled model comes here for every layer of every token
    rows = x if x.dim() == 2 and x.stride(1) == 1 else rows_of(x)
    y = x.new_empty((*x.shape[:-1], out))
    if not y.numel():
        return y
    described = describe(codes, scale, zero, grid, bits, out, in_features, group)
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        bias = bias.to(x.dtype).contiguous()
    target, extra = c_void_p(y.data_ptr()), None if bias is None else c_void_p(bias.data_ptr())
    status = described.library.linear(
        described.pointers,
        1,
        rows.data_ptr(),
        rows.shape[0],
        rows.stride(0),
        DTYPES[x.dtype],
        ctypes.byref(target),
        described.out_stride,
        None if extra is None else ctypes.byref(extra),
        mode,
        torch.get_num_threads(),
    )
    if status:
        check(status)
    return y


def _dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    grid: GridName,
    bits: int,
    out: int,
    in_features: int,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    weight = codes.new_empty((out, in_features), dtype=dtype)
    described = describe(codes, scale, zero, grid, bits, out, in_features, group)
    address, threads = ctypes.byref(described.weight), torch.get_num_threads()
    check(functions().dequantize(address, 0, out, weight.data_ptr(), in_features, DTYPES[dtype], threads))
    return weight


def _gather_rows(
    ids: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    grid: GridName,
    bits: int,
    out: int,
    in_features: int,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    wanted = ids.to(torch.int64).contiguous()
    found = codes.new_empty((*ids.shape, in_features), dtype=dtype)
    if not wanted.numel():
        return found
    low, high = wanted.aminmax()
    if int(low) < 0 or int(high) >= out:
        raise IndexError(f"index out of range: ids lie in {int(low)} .. {int(high)}, the table has {out} rows")
    described = describe(codes, scale, zero, grid, bits, out, in_features, group)
    arguments = (wanted.data_ptr(), wanted.numel(), found.data_ptr(), in_features, DTYPES[dtype])
    check(functions().gather_rows(ctypes.byref(described.weight), *arguments, torch.get_num_threads()))
    return found


# --- gradients: to x and to the biases; the weight never trains ------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, codes, scale, zero, grid, bits, out, in_features, group, bias, _ = inputs
    ctx.save_for_backward(codes, scale, zero)
    ctx.sizes = (grid, bits, out, in_features, group)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = gradient @ torch.ops.hf_quant.dequantize(*ctx.saved_tensors, *ctx.sizes, gradient.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[9]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
    return (to_x, *[None] * 8, to_bias, None)


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    _, codes, scales, zeros, biases, grids, bits, outs, groups, _ = inputs
    ctx.save_for_backward(*codes, *scales, *zeros)
    ctx.sizes = list(zip(grids, bits, outs, groups, strict=True))
    ctx.columns = inputs[0].shape[-1]
    ctx.bias_dtypes = [bias.dtype if bias.numel() else None for bias in biases]


def _backward_all(ctx: Any, gradients: list[torch.Tensor | None]) -> tuple[Any, ...]:
    count = len(ctx.sizes)
    saved = ctx.saved_tensors
    codes, scales, zeros = saved[:count], saved[count : 2 * count], saved[2 * count :]
    to_x: torch.Tensor | None = None
    to_biases: list[torch.Tensor | None] = []
    for i, gradient in enumerate(gradients):
        dtype = ctx.bias_dtypes[i]
        if gradient is None:
            to_biases.append(None)
            continue
        grid, bits, out, group = ctx.sizes[i]
        if ctx.needs_input_grad[0]:
            zero = zeros[i] if zeros[i].numel() else None
            weight = torch.ops.hf_quant.dequantize(
                codes[i], scales[i], zero, grid, bits, out, ctx.columns, group, gradient.dtype
            )
            part = gradient @ weight
            to_x = part if to_x is None else to_x + part
        flat = gradient.reshape(-1, gradient.shape[-1])
        to_biases.append(None if dtype is None else flat.sum(0).to(dtype))
    return (to_x, [None] * count, [None] * count, [None] * count, to_biases, None, None, None, None, None)


# --- registration ----------------------------------------------------------------------------------------------------

_WEIGHT = "Tensor codes, Tensor scale, Tensor? zero, str grid, int bits, int out, int in_features, int group"
_LIBRARY = torch.library.Library("hf_quant", "FRAGMENT")
_LIBRARY.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias, int mode) -> Tensor")
# the same without gradients, whose registration costs a third of a call
_LIBRARY.define(f"linear_inference(Tensor x, {_WEIGHT}, Tensor? bias, int mode) -> Tensor")
_LIBRARY.define(
    "linears(Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] zeros, Tensor[] biases, str[] grids, int[] bits, "
    "int[] outs, int[] groups, int mode) -> Tensor[]"
)
_LIBRARY.define(f"dequantize({_WEIGHT}, ScalarType dtype) -> Tensor")
_LIBRARY.define(f"gather_rows(Tensor ids, {_WEIGHT}, ScalarType dtype) -> Tensor")
for _name, _run in (
    ("linear", _linear),
    ("linear_inference", _linear),
    ("linears", _linears),
    ("dequantize", _dequantize),
    ("gather_rows", _gather_rows),
):
    _LIBRARY.impl(_name, _run, "CPU")


@torch.library.register_fake("hf_quant::linear", lib=_LIBRARY)
@torch.library.register_fake("hf_quant::linear_inference", lib=_LIBRARY)
def _fake_linear(x: torch.Tensor, codes: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rest[4]))


@torch.library.register_fake("hf_quant::linears", lib=_LIBRARY)
def _fake_linears(x: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    return [x.new_empty((*x.shape[:-1], out)) for out in rest[6]]


@torch.library.register_fake("hf_quant::dequantize", lib=_LIBRARY)
def _fake_dequantize(codes: torch.Tensor, *rest: Any) -> torch.Tensor:
    return codes.new_empty((rest[4], rest[5]), dtype=rest[7])


@torch.library.register_fake("hf_quant::gather_rows", lib=_LIBRARY)
def _fake_gather_rows(ids: torch.Tensor, codes: torch.Tensor, *rest: Any) -> torch.Tensor:
    return codes.new_empty((*ids.shape, rest[5]), dtype=rest[7])


torch.library.register_autograd("hf_quant::linear", _backward, setup_context=_keep, lib=_LIBRARY)
torch.library.register_autograd("hf_quant::linears", _backward_all, setup_context=_keep_all, lib=_LIBRARY)
