"""Model skeleton + config -> Plan: per module the scheme and its bytes, or why it stays in float."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hf_quant.grids import Scheme


@dataclass(frozen=True)
class PlannedLayer:
    """What happens to one weight.

    Attributes:
        name: module name (``model.layers.0.self_attn.q_proj``); a bare parameter has its own name.
        kind: ``Linear``, ``Conv1D``, ``Embedding``, ``Norm``, ``Parameter`` ...
        shape: ``(out, in)`` for linears, the parameter's shape otherwise.
        scheme: how it is quantized; None when it stays in float.
        method: the algorithm that chooses scales and codes; empty when it stays in float.
        rule: which rule decided (``default``, ``override 're:.*mlp.*'``, ``skip 'lm_head'``).
        note: why it stays in float, or why its group is not the one asked for; else empty.
        float_bytes: bytes in the float checkpoint.
        planned_bytes: bytes after quantization.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    method: str
    rule: str
    note: str
    float_bytes: int
    planned_bytes: int

    @property
    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class Plan:
    """Every weight of a model and what happens to it."""

    architecture: str
    model_type: str
    format: str
    scale_dtype: str
    layers: tuple[PlannedLayer, ...]

    @cached_property
    def quantized(self) -> tuple[PlannedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.scheme is not None)

    @cached_property
    def kept(self) -> tuple[PlannedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.scheme is None)

    @property
    def float_bytes(self) -> int:
        return sum(layer.float_bytes for layer in self.layers)

    @property
    def planned_bytes(self) -> int:
        return sum(layer.planned_bytes for layer in self.layers)
