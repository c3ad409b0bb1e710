"""The kernel ``native``: hf-quant's own C++ for CPUs, on codes tiled for it (see ``csrc/``); first choice on a CPU.

Eager calls go straight to the library. Whatever traces a call (torch.compile, torch.export, fake tensors) meets the
operators of :mod:`hf_quant.kernels.native_ops` instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_void_p
from dataclasses import dataclass

import torch

from hf_quant.errors import KernelError
from hf_quant.kernels import memory, native_library, native_ops, tiles
from hf_quant.kernels.autograd import linear_by_rows
from hf_quant.kernels.native_library import DTYPES
from hf_quant.kernels.native_ops import Described
from hf_quant.kernels.registry import FLOAT, INT8, Kernel, LayerSpec, Prepared
from hf_quant.tensor import QuantizedTensor

BLOCK = 8  # columns


@dataclass(frozen=True, kw_only=True)
class NativePrepared(Prepared):
    """A weight in tiles; ``scale`` and ``zero_point`` are tiled too and replace those of the layer.

    Attributes:
        described: the same for the library: its address there, sizes and pointers into these tensors.
        mode: 0 computes with float activations, 1 quantizes them to int8 on the fly.
    """

    described: Described
    mode: int


class NativeKernel(Kernel):
    """See the module's docstring. ``extras``: ``scale`` ``[tiles, in/group, 16]`` and ``zero_point`` likewise.

    Double-quantized scales are expanded to float32; plain ones keep their dtype.
    """

    name = "native"
    relayouts = True
    activation_modes = (FLOAT, INT8)
    looks_up = True

    def unavailable(self) -> str | None:
        return native_library.unavailable()

    def missed(self) -> bool:
        return not native_library.switched_off()

    def unsupported(self, spec: LayerSpec) -> str | None:
        if spec.device != "cpu":
            return f"it runs on cpu, not on {spec.device}"
        if spec.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16 activations, not {spec.dtype_name}"
        if spec.in_features % spec.group:
            return f"groups of {spec.group} do not divide rows of {spec.in_features}"
        if spec.group % BLOCK and spec.group != spec.in_features:
            return f"groups of {spec.group} are no multiple of the {BLOCK} columns that it takes at a time"
        return None

    def activations(self, spec: LayerSpec) -> str:
        return INT8 if spec.activations == INT8 and spec.scheme.grid == "int" else FLOAT

    def describe(self, spec: LayerSpec) -> str:
        line = f"native {native_library.variant()}"
        if self.activations(spec) == INT8:
            return f"{line}, activations quantized to int8 on the fly"
        if spec.activations == INT8:
            return f"{line}, float activations (the levels of {spec.scheme.grid} are no whole numbers)"
        return line

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, tensor: QuantizedTensor, spec: LayerSpec) -> NativePrepared:
        codes = native_ops.pack(tensor.packed, spec.out_features, spec.in_features, spec.scheme.bits)
        scale = memory.kept(tiles.rows_to_tiles(tensor.scales()))
        extras = {"scale": scale}
        zero = None if tensor.zero_point is None else memory.kept(tiles.rows_to_tiles(tensor.zero_point))
        if zero is not None:
            extras["zero_point"] = zero
        described = native_ops.describe(
            codes, scale, zero, spec.scheme.grid, spec.scheme.bits, spec.out_features, spec.in_features, spec.group
        )
        return NativePrepared(
            weight=codes,
            extras=extras,
            scale=None if tensor.nested is not None else scale,
            zero_point=zero,
            described=described,
            mode=int(self.activations(spec) == INT8),
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self, prepared: Prepared, spec: LayerSpec) -> torch.Tensor:
        return native_ops.unpack(prepared.weight, spec.out_features, spec.in_features, spec.scheme.bits)

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore_rows(self, tiled: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
        return tiles.tiles_to_rows(tiled, spec.out_features)

    def dequantize(self, prepared: Prepared, spec: LayerSpec, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in DTYPES:
            return self.dequantize(prepared, spec, torch.float32).to(dtype)
        weight: torch.Tensor = torch.ops.hf_quant.dequantize(*_operands(prepared, spec), dtype)
        return weight

    def linear(
        self, x: torch.Tensor, prepared: Prepared, spec: LayerSpec, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert isinstance(prepared, NativePrepared)
        trains = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
            _check(x, spec)
            operator = torch.ops.hf_quant.linear if trains else torch.ops.hf_quant.linear_inference
            y: torch.Tensor = operator(x, *_operands(prepared, spec), bias, prepared.mode)
            return y
        if trains:
            _check(x, spec)
            return linear_by_rows(self, _product, x, prepared, spec, bias)
        return _product(x, prepared, spec, bias)

    def gather(self, ids: torch.Tensor, prepared: Prepared, spec: LayerSpec) -> torch.Tensor:
        rows: torch.Tensor = torch.ops.hf_quant.gather_rows(ids, *_operands(prepared, spec), spec.dtype)
        return rows


def linears(
    x: torch.Tensor,
    prepared: Sequence[NativePrepared],
    specs: Sequence[LayerSpec],
    biases: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """The products of one ``x [..., in]`` with several weights, in one call that converts ``x`` once.

    Raises:
        KernelError: widths differ, or some weights take int8 activations and others do not.
    """
    for spec in specs:
        _check(x, spec)
    modes = {each.mode for each in prepared}
    if len(modes) > 1:
        raise KernelError("weights that share an input differ in their activations.", "ask for the same in all layers.")
    operands = [_operands(each, spec) for each, spec in zip(prepared, specs, strict=True)]
    codes, scales, zeros, grids, bits, outs, _, groups = (list(column) for column in zip(*operands, strict=True))
    none = x.new_empty(0)
    zeros, given = ([none if each is None else each for each in column] for column in (zeros, biases))
    found: list[torch.Tensor] = torch.ops.hf_quant.linears(
        x, codes, scales, zeros, given, grids, bits, outs, groups, modes.pop()
    )
    return found


def _operands(
    prepared: Prepared, spec: LayerSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, str, int, int, int, int]:
    """A weight as the operators take it: codes, scale, zero, grid, bits, out, in, group."""
    scheme, extras = spec.scheme, prepared.extras
    return (
        prepared.weight,
        extras["scale"],
        extras.get("zero_point"),
        scheme.grid,
        scheme.bits,
        spec.out_features,
        spec.in_features,
        spec.group,
    )


def _check(x: torch.Tensor, spec: LayerSpec) -> None:
    if x.dtype not in DTYPES:
        raise KernelError(
            f"kernel native got {x.dtype} activations.",
            "it takes float32, bfloat16 and float16; kernel=reference takes any dtype.",
        )
    if x.shape[-1] != spec.in_features:
        raise KernelError(
            f"x has {x.shape[-1]} columns, but the weight is [{spec.out_features}, {spec.in_features}].",
            "the layer before this one gives another width.",
        )


def _product(x: torch.Tensor, prepared: Prepared, spec: LayerSpec, bias: torch.Tensor | None) -> torch.Tensor:
    """The call itself, on the shortest way: this runs two hundred times for a token of a small model."""
    assert isinstance(prepared, NativePrepared)
    dtype, shape, columns, out = x.dtype, x.shape, spec.in_features, spec.out_features
    code = DTYPES.get(dtype)
    if code is None or shape[-1] != columns:
        _check(x, spec)
    if x.is_contiguous():
        rows, stride = x.numel() // columns, columns
    else:
        x = native_ops.rows_of(x)
        rows, stride = x.shape
        stride = x.stride(0)
    y = x.new_empty((*shape[:-1], out))
    if not rows:
        return y
    target = c_void_p(y.data_ptr())
    extra = None
    if bias is not None:
        if bias.dtype != dtype or not bias.is_contiguous():
            bias = bias.to(dtype).contiguous()
        extra = ctypes.byref(c_void_p(bias.data_ptr()))
    described = prepared.described
    status = described.library.linear(
        described.pointers,
        1,
        x.data_ptr(),
        rows,
        stride,
        code,
        ctypes.byref(target),
        described.out_stride,
        extra,
        prepared.mode,
        torch.get_num_threads(),
    )
    if status:
        native_library.check(status)
    return y
