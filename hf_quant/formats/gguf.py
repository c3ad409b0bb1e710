"""GGUF's block types: QuantizedTensor -> the bytes of one Q4_0, Q4_1 or Q8_0 tensor (pure functions; write only).

A row is cut into blocks of 32 columns, each with its own float16 fields, all little-endian (``block_q4_0``,
``block_q4_1`` and ``block_q8_0`` in ggml-common.h):

* Q4_0, 18 bytes: ``d``, then 16 bytes of codes; value = (code - 8) * d. Byte j holds column j in its low nibble and
  column j + 16 in its high one.
* Q4_1, 20 bytes: ``d``, ``m``, codes as above; value = code * d + m. A zero point z becomes m = -z * d.
* Q8_0, 34 bytes: ``d``, then 32 signed bytes; value = byte * d.

A group of 64 or 128 columns is two or four blocks with the same fields. A code never changes. A scale or an offset that
is no float16 number has to be rounded: :func:`rounding` measures what that does, :func:`encode` refuses it unasked.
bfloat16 scales are float16 numbers from 2**-17 up (8 significant bits of 11); their product with a zero point may take
12 bits, which float16 does not have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_quant.errors import FormatError
from hf_quant.grids import Scheme
from hf_quant.tensor import QuantizedTensor

NAME = "gguf"
BLOCK = 32
Q4_0, Q4_1, Q8_0 = "Q4_0", "Q4_1", "Q8_0"
_ENDS = {Q4_0: (-8.0, 7.0), Q4_1: (0.0, 15.0), Q8_0: (-128.0, 127.0)}  # what the fields are multiplied by at most
_LIMIT = 0.5  # of a step: a weight that moves further may as well have another code


@dataclass(frozen=True)
class Rounding:
    """What float16 fields cost one weight.

    Attributes:
        blocks: how many blocks of 32 columns have a scale or an offset that is rounded.
        of: of how many.
        steps: the most that a weight can move by, in steps of its group (multiples of its scale).
    """

    blocks: int
    of: int
    steps: float

    @property
    def exact(self) -> bool:
        return self.blocks == 0

    def __str__(self) -> str:
        return (
            f"{self.blocks:,} of {self.of:,} blocks have a scale or an offset that is no float16 number; "
            f"rounded, a weight moves by at most {self.steps:.2g} of its step"
        )


def type_of(scheme: Scheme) -> str:
    """The block type that holds a scheme: ``Q4_0``, ``Q4_1`` or ``Q8_0`` (for what :func:`holds` accepts)."""
    if scheme.bits == 8:
        return Q8_0
    return Q4_0 if scheme.symmetric else Q4_1


def holds(scheme: Scheme, kind: str, shape: tuple[int, ...]) -> str | None:
    """Why GGUF cannot hold a layer; None when it can, scales apart (see :func:`rounding`)."""
    if scheme.grid != "int":
        return f"GGUF has no {scheme.grid} blocks (its 4-bit blocks hold evenly spaced values)"
    if scheme.bits == 8 and not scheme.symmetric:
        return "GGUF's 8-bit blocks have no zero points"
    if len(shape) != 2:
        return f"{NAME} is written for 2-D weights, not {list(shape)}"
    if shape[1] % BLOCK:
        return f"its rows of {shape[1]} columns are not whole blocks of {BLOCK}"
    group = scheme.group(shape[1])
    if group % BLOCK or shape[1] % group:
        return f"its groups of {group} columns are not whole blocks of {BLOCK}"
    return None


def rounding(tensor: QuantizedTensor) -> Rounding:
    """What storing the scales (and offsets) of a weight as float16 changes."""
    scale, offset, half, half_offset = _fields(tensor)
    changed = (half.float() != scale) | (half_offset.float() != offset)
    first, last = _ENDS[type_of(tensor.scheme)]
    error, shift = half.float() - scale, half_offset.float() - offset
    moved = torch.maximum((first * error + shift).abs(), (last * error + shift).abs())
    # a scale of 0 stays 0; what overflows float16 moves by inf
    steps = torch.where(changed, moved / scale.abs(), 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    per_group = tensor.scheme.group(tensor.shape[1]) // BLOCK
    return Rounding(int(changed.sum()) * per_group, changed.numel() * per_group, float(steps.max()))


def check(tensor: QuantizedTensor, *, name: str = "", round_scales: bool = False) -> Rounding:
    """What it costs to write a weight; arguments and errors as for :func:`encode`."""
    label = name or "the weight"
    reason = holds(tensor.scheme, "Linear", tensor.shape)
    if reason is not None:
        raise FormatError(
            f"{label} cannot be converted: {reason}.",
            "quantize the float model again with bits=4, or with symmetric bits=8, in groups of 32, 64 or 128 "
            "(grid=int); or choose another --to.",
        )
    if tensor.order is not None:
        raise FormatError(
            f"{label} cannot be converted: its columns are reordered (GPTQ's act-order), which GGUF cannot express.",
            "choose another --to, or quantize the float model again without act-order.",
        )
    cost = rounding(tensor)
    if cost.steps >= _LIMIT:
        raise FormatError(
            f"{label} cannot be converted: float16 does not reach its scales (a weight would move by "
            f"{cost.steps:.2g} steps).",
            "leave this layer in float (skip), or choose another --to.",
        )
    if not cost.exact and not round_scales:
        raise FormatError(
            f"{label} cannot be converted exactly: {cost}.",
            "pass --round-scales to accept that; symmetric grids with bfloat16 or float16 scales need no rounding.",
        )
    return cost


def encode(tensor: QuantizedTensor, *, name: str = "", round_scales: bool = False) -> torch.Tensor:
    """The bytes of one weight.

    Args:
        tensor: ``[out, in]``, columns in their place.
        name: module name for errors.
        round_scales: allow scales and offsets to be rounded to float16, by less than half a step.

    Returns:
        uint8 ``[out, in / 32 * bytes per block]``.

    Raises:
        FormatError: GGUF cannot hold it, or not without rounding.
    """
    check(tensor, name=name, round_scales=round_scales)
    rows, columns = tensor.shape
    _, _, half, half_offset = _fields(tensor)
    codes = tensor.codes().view(rows, columns // BLOCK, BLOCK)
    signed = tensor.scheme.bits == 8  # code - 128, as a byte
    stored = codes ^ 128 if signed else codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)
    repeats = tensor.scheme.group(columns) // BLOCK
    fields = [half] if tensor.zero_point is None else [half, half_offset]
    heads = [_little_endian(field).repeat_interleave(repeats, dim=1) for field in fields]
    return torch.cat([*heads, stored], dim=-1).view(rows, -1)


def _fields(tensor: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales and offsets (``-zero * scale``) ``[out, groups]`` in float32, then both in float16."""
    scale = tensor.scales().float()
    offset = torch.zeros_like(scale) if tensor.zero_point is None else -tensor.zero_point.float() * scale
    return scale, offset, scale.half(), offset.half()


def _little_endian(field: torch.Tensor) -> torch.Tensor:
    """float16 ``[out, groups]`` -> uint8 ``[out, groups, 2]``, the low byte first on any machine."""
    word = field.view(torch.int16).to(torch.int32)
    return torch.stack((word & 0xFF, (word >> 8) & 0xFF), dim=-1).to(torch.uint8)
