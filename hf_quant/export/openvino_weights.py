"""QuantizedTensor -> the constants of an OpenVINO graph that stand for it, compressed, and what decompresses them.

OpenVINO's plugins recognize ``Constant (u4, i4, u8, i8, nf4) -> Convert -> [Subtract] -> Multiply -> [Reshape]`` in
front of a MatMul or a Gather and keep the constant packed at run time (``MarkDequantization`` and
``CompressedWeightsBlock`` in its sources). Everything after the constant is float32, so the graph stands for exactly
the weights of the checkpoint. Elements of 4 bits lie in row order without padding, the first one in the low nibble,
which is our canonical packing for an even number of columns.

    int4 symmetric   i4, code - 8            no zero point
    int4 asymmetric  u4, code                u4 zero points
    int8 symmetric   i8, code - 128          no zero point
    int8 asymmetric  u8, code                u8 zero points
    nf4              nf4: OpenVINO's table has the values of bitsandbytes in the same order

Scales are stored in their own dtype; double-quantized ones as the float32 numbers that they stand for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch

from hf_quant.errors import FormatError
from hf_quant.grids import Scheme
from hf_quant.tensor import QuantizedTensor, pack_codes

_FLOATS = {torch.float32: ov.Type.f32, torch.float16: ov.Type.f16, torch.bfloat16: ov.Type.bf16}
_SIGN = {4: 0x88, 8: 0x80}  # flips the top bit of every code in a byte: unsigned codes become two's complement


def check(scheme: Scheme, name: str) -> None:
    """Raises FormatError when OpenVINO has no type for the codes of a layer."""
    if scheme.grid == "fp4":
        raise FormatError(
            f"{name} cannot be written for OpenVINO: its f4e2m1 has other levels than bitsandbytes' FP4.",
            "keep the format that the checkpoint has, or quantize the float model to int4 or nf4.",
        )


def type_of(scheme: Scheme) -> ov.Type:
    """The element type of the constant that holds the codes of a scheme that :func:`check` accepts."""
    if scheme.grid == "nf4":
        return ov.Type.nf4
    signed, unsigned = (ov.Type.i4, ov.Type.u4) if scheme.bits == 4 else (ov.Type.i8, ov.Type.u8)
    return signed if scheme.symmetric else unsigned


def decompressed(tensor: QuantizedTensor, name: str) -> ov.Output:
    """The nodes that stand for a weight: a float32 output ``[out, in]``, columns in the order of the stored codes.

    Args:
        tensor: what they stand for; ``order`` is up to the caller.
        name: of the layer, for the friendly names of the nodes.

    Raises:
        FormatError: see :func:`check`.
    """
    scheme, (rows, columns) = tensor.scheme, tensor.shape
    check(scheme, name)
    groups, group = scheme.groups(columns), scheme.group(columns)
    grouped = groups > 1
    flat = _packed(tensor)
    if scheme.grid == "int" and scheme.symmetric:
        flat = flat ^ _SIGN[scheme.bits]
    kind, few = type_of(scheme), [rows, groups, 1] if grouped else [rows, 1]
    value: Any = _constant(flat, [rows, groups, group] if grouped else [rows, columns], kind, f"{name}.weight")
    value = ops.convert(value, "f32")
    if tensor.zero_point is not None:
        zeros = pack_codes(tensor.zero_point.reshape(1, -1), scheme.bits)
        value = ops.subtract(value, ops.convert(_constant(zeros, few, kind, f"{name}.zero_point"), "f32"))
    scale = tensor.scales().contiguous()
    scales: Any = _constant(scale, few, _FLOATS[scale.dtype], f"{name}.scale")
    if scale.dtype != torch.float32:
        scales = ops.convert(scales, "f32")
    value = ops.multiply(value, scales)
    if grouped:
        value = ops.reshape(value, np.array([rows, columns], dtype=np.int64), special_zero=False)
    value.set_friendly_name(f"{name}.decompressed")
    return value.output(0)


def _packed(tensor: QuantizedTensor) -> torch.Tensor:
    """The codes as OpenVINO lays them out: uint8, no padding between rows."""
    bits, odd = tensor.scheme.bits, tensor.shape[1] % 2
    return pack_codes(tensor.codes().reshape(1, -1), bits) if bits == 4 and odd else tensor.packed


def _constant(data: torch.Tensor, shape: list[int], kind: ov.Type, name: str) -> ov.Node:
    """A constant with a copy of ``data``, read as the bytes of elements of ``kind``."""
    held = data.contiguous().cpu().view(torch.uint8).numpy().reshape(-1)
    found = ops.constant(ov.Tensor(held, ov.Shape(shape), kind), shared_memory=False)
    found.set_friendly_name(name)
    return found
