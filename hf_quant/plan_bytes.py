"""How many bytes a planned layer takes in the format that its plan is published in."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from hf_quant.grids import DOUBLE_QUANT_BLOCK, Scheme

if TYPE_CHECKING:
    from hf_quant.plan import Plan, PlannedLayer


def restated(plan: Plan, format_name: str, scale_dtype: str) -> Plan:
    """The same plan, published in another format."""
    other = replace(plan, format=format_name, scale_dtype=scale_dtype)
    return replace(other, layers=tuple(replace(q, planned_bytes=planned_bytes(q, other)) for q in other.layers))


def planned_bytes(layer: PlannedLayer, plan: Plan) -> int:
    """Bytes of the layer's tensors in the published format (its bias is a row of its own)."""
    scheme = layer.scheme
    if scheme is None:
        return layer.float_bytes
    rows, columns = layer.shape
    groups = scheme.groups(columns)
    if plan.format == "bitsandbytes":
        scales = rows * groups
        header = 16 * 4 + _state_bytes(layer, scheme, plan.scale_dtype)  # quant_map and the quant_state
        nested = scales + 4 * math.ceil(scales / DOUBLE_QUANT_BLOCK) + 256 * 4
        return rows * columns // 2 + (nested if scheme.double_quant else 4 * scales) + header
    bits = 8 if plan.format.endswith("-quantized") else scheme.bits  # int-quantized has a byte for every code
    codes = rows * 4 * math.ceil(columns * bits / 32)
    always = plan.format in ("gptq", "gptq_v2", "awq")
    zeros = 4 * math.ceil(rows * bits / 32) * groups if always or not scheme.symmetric else 0
    others = {"compressed-tensors": 2 * 8, "gptq": 4 * columns, "gptq_v2": 4 * columns}.get(plan.format, 0)
    return codes + rows * groups * getattr(torch, plan.scale_dtype).itemsize + zeros + others


def _state_bytes(layer: PlannedLayer, scheme: Scheme, scale_dtype: str) -> int:
    """Length of the json in which bitsandbytes describes a weight (its mean scale has a varying number of digits)."""
    half = scale_dtype if scale_dtype != "float32" else "bfloat16"
    state: dict[str, object] = {
        "quant_type": scheme.grid,
        "blocksize": scheme.group(layer.shape[1]),
        "dtype": "float32" if layer.float_bytes == 4 * layer.numel else half,
        "shape": list(layer.shape),
    }
    if scheme.double_quant:
        state |= {
            "nested_blocksize": DOUBLE_QUANT_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": 0.0123456789012345,
        }
    return len(json.dumps(state))
