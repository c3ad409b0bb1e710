"""The kernel ``reference``: plain torch on any device, and the definition of the result for every other kernel.

The weight is dequantized in float32 and rounded once to the dtype of the activations, then multiplied as any dense
weight. On CPU that happens a few rows of the weight at a time, so that the float copy stays in the cache and the
allocator never has to ask the system for pages; under torch.compile the whole weight is one expression to fuse.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from hf_quant.grids import GridName, Scheme, levels
from hf_quant.kernels.autograd import linear_by_rows
from hf_quant.kernels.registry import Kernel, LayerSpec, Prepared
from hf_quant.tensor import QuantizedTensor, unpack_codes

# Weights dequantized at a time, 2 MB as float32. Measured on cores with 1 MB of L2 each: 1-4 MB are alike; at 0.25 MB
# the calls cost more than the cache saves, from 16 MB on page faults double the time.
CHUNK = 1 << 19


class ReferenceKernel(Kernel):
    """Runs every layer. ``extras``: ``scale`` ``[out, in/group]``, ``zero_point`` (asymmetric), ``pairs`` (tables)."""

    name = "reference"
    relayouts = False
    looks_up = True

    def unsupported(self, spec: LayerSpec) -> str | None:
        if not spec.dtype.is_floating_point:
            return f"{spec.dtype_name} activations are not floating point"
        if spec.in_features % spec.group:
            return f"groups of {spec.group} do not divide rows of {spec.in_features}"
        return None

    def describe(self, spec: LayerSpec) -> str:
        return f"dequantized to {spec.dtype_name}, torch matmul"

    def prepare(self, tensor: QuantizedTensor, spec: LayerSpec) -> Prepared:
        return Prepared(tensor.packed, canonical_extras(tensor))

    def restore(self, prepared: Prepared, spec: LayerSpec) -> torch.Tensor:
        return prepared.weight

    def dequantize(self, prepared: Prepared, spec: LayerSpec, dtype: torch.dtype) -> torch.Tensor:
        return dequantized_weight(prepared, spec, dtype)

    def linear(
        self, x: torch.Tensor, prepared: Prepared, spec: LayerSpec, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return linear_by_rows(self, dequantized_product, x, prepared, spec, bias)

    def gather(self, ids: torch.Tensor, prepared: Prepared, spec: LayerSpec) -> torch.Tensor:
        rows = _dequantize(prepared, spec, ids.reshape(-1), spec.dtype)
        return rows.view(*ids.shape, spec.in_features)


def canonical_extras(tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """What :func:`dequantized_product` reads besides the canonical codes; nested scales are expanded to float32."""
    extras = {"scale": tensor.scales()}
    if tensor.zero_point is not None:
        extras["zero_point"] = tensor.zero_point
    if tensor.scheme.grid != "int":
        extras["pairs"] = _pairs(tensor.scheme.grid, tensor.device)
    return extras


def dequantized_weight(prepared: Prepared, spec: LayerSpec, dtype: torch.dtype) -> torch.Tensor:
    """The weight ``[out, in]`` of canonical codes with :func:`canonical_extras`."""
    scale = prepared.extras["scale"]
    if scale.device.type != "cpu" or torch.compiler.is_compiling():
        return _dequantize(prepared, spec, slice(None), dtype)
    weight = scale.new_empty((spec.out_features, spec.in_features), dtype=dtype)
    for rows in row_chunks(spec):
        weight[rows] = _dequantize(prepared, spec, rows, dtype)
    return weight


def dequantized_product(
    x: torch.Tensor,
    prepared: Prepared,
    spec: LayerSpec,
    bias: torch.Tensor | None,
    weight_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``x [rows, in] @ dequantized(canonical codes).T + bias`` -> ``[rows, out]``; no gradients.

    Args:
        x: rows of any dtype.
        prepared: canonical codes with :func:`canonical_extras`.
        spec: the layer.
        bias: ``[out]`` in the dtype of the product, or None.
        weight_dtype: of the weight and of the product; that of ``x`` when None.
    """
    dtype = weight_dtype or x.dtype
    x = x.to(dtype)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return functional.linear(x, _dequantize(prepared, spec, slice(None), dtype), bias)
    parts = [
        functional.linear(x, _dequantize(prepared, spec, rows, dtype), None if bias is None else bias[rows])
        for rows in row_chunks(spec)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def row_chunks(spec: LayerSpec, multiple: int = 64) -> list[slice]:
    """Slices of output rows with about CHUNK weights each."""
    step = max(1, CHUNK // (multiple * spec.in_features)) * multiple
    return [slice(start, min(start + step, spec.out_features)) for start in range(0, spec.out_features, step)]


def scaled(codes: torch.Tensor, zero: torch.Tensor | int, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``(codes - zero) * scale`` on the int grid, rounded once to ``dtype``; operands broadcast.

    Args:
        codes: uint8; at 4 bits (``zero`` is int8, or a number below 128) they are overwritten.
        zero: the zero points, int8 (4-bit codes) or uint8 (8-bit codes).
        scale: bfloat16, float16 or float32.
        dtype: of the result.
    """
    # Always in float32: bfloat16 arithmetic has to widen and round at every step and is slower.
    if isinstance(zero, torch.Tensor) and zero.dtype != torch.int8:
        values = codes.to(torch.float32).sub_(zero.to(torch.float32))
    elif isinstance(zero, int) and zero > 127:
        values = codes.bitwise_xor(128).view(torch.int8).to(torch.float32)
    else:
        values = codes.view(torch.int8).sub_(zero).to(torch.float32)
    return values.mul_(scale.to(torch.float32)).to(dtype)


def _dequantize(prepared: Prepared, spec: LayerSpec, rows: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the weight (a slice, or indices) as ``[rows, in]``, bit for bit ``grids.decode(...).to(dtype)``."""
    scheme, columns = spec.scheme, spec.in_features
    packed = _some(prepared.weight, rows)
    scale = _some(prepared.extras["scale"], rows).unsqueeze(-1)
    if scheme.grid != "int":
        values = prepared.extras["pairs"].index_select(0, packed.reshape(-1).to(torch.int32)).view(torch.float32)
        values = values.view(packed.shape[0], packed.shape[1] * 2)[:, :columns]
        weight = values.view(packed.shape[0], columns // spec.group, spec.group).mul_(scale.to(torch.float32)).to(dtype)
    else:
        codes = unpack_codes(packed, scheme.bits, columns).view(packed.shape[0], columns // spec.group, spec.group)
        weight = scaled(codes, _zero(prepared, scheme, rows), scale, dtype)
    return weight.reshape(-1, columns)


def _some(tensor: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
    # index_select, unlike an index, refuses negative rows
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _zero(prepared: Prepared, scheme: Scheme, rows: slice | torch.Tensor) -> torch.Tensor | int:
    if scheme.symmetric:
        return scheme.implied_zero_point
    zero = _some(prepared.extras["zero_point"], rows).unsqueeze(-1)
    return zero.view(torch.int8) if scheme.bits == 4 else zero


@cache
def _pairs(grid: GridName, device: torch.device) -> torch.Tensor:
    """For each byte the float32 levels of its two codes, the pair viewed as one int64: ``[256]``."""
    with torch.inference_mode(False):  # the first caller may be in inference mode, the next one in training
        codes = unpack_codes(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(1), 4, 2)
        return levels(grid, device)[codes.to(torch.int32)].contiguous().view(torch.int64).view(-1)
