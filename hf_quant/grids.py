"""Number grids: which values a code can stand for, and how scales are laid over a weight (pure maths).

Two families:

* ``int``: value = (code - zero_point) * scale, codes ``0 .. 2**bits - 1``. On the symmetric grid the zero point is the
  constant ``2**(bits - 1)`` and the scale may be negative, so that either end of the range can use the extra code.
* ``nf4`` / ``fp4``: value = LEVELS[code] * scale with 16 fixed levels in [-1, 1]. NF4 is from QLoRA
  (arXiv:2305.14314); both tables and their code order are those of bitsandbytes, whose kernels read our codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hf_quant.errors import ConfigError

GridName = Literal["int", "nf4", "fp4"]
PER_CHANNEL = -1
DOUBLE_QUANT_BLOCK = 256

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# sign | 2-bit exponent | 1-bit mantissa in bit-pattern order, divided by the largest magnitude (12)
FP4_LEVELS = tuple(v / 12.0 for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)) + tuple(
    -v / 12.0 for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)


@dataclass(frozen=True)
class Scheme:
    """How one weight ``[out, in]`` is quantized; everything that a kernel or a format must know besides the tensors.

    Attributes:
        grid: ``int``, ``nf4`` or ``fp4``.
        bits: 4 or 8 (the table grids are 4-bit).
        symmetric: no zero points (always true for the table grids).
        group_size: consecutive input columns that share a scale; ``PER_CHANNEL`` (-1) is the whole row.
        double_quant: the scales themselves are stored as 8-bit codes (table grids only, as bitsandbytes does).
    """

    grid: GridName = "int"
    bits: int = 4
    symmetric: bool = True
    group_size: int = 32
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.grid not in ("int", "nf4", "fp4"):
            raise ConfigError(f"unknown grid {self.grid!r}.", "use one of int, nf4, fp4.")
        if self.bits not in (4, 8):
            raise ConfigError(f"bits={self.bits} is not supported.", "use 4 or 8.")
        if self.grid != "int" and self.bits != 4:
            raise ConfigError(f"grid={self.grid} has 16 levels, but bits={self.bits}.", "use bits=4 or grid=int.")
        if self.grid != "int" and not self.symmetric:
            raise ConfigError(f"grid={self.grid} has no zero points.", "drop symmetric=False or use grid=int.")
        if self.double_quant and self.grid == "int":
            raise ConfigError("double_quant needs grid=nf4 or grid=fp4.", "drop double_quant.")
        if self.group_size != PER_CHANNEL and self.group_size < 1:
            raise ConfigError(f"group_size={self.group_size} is not positive.", "use 32, 64, 128 or -1 (per channel).")

    def group(self, in_features: int) -> int:
        """The group size in columns for a row of ``in_features`` (per channel: the row itself)."""
        return in_features if self.group_size == PER_CHANNEL else self.group_size

    def groups(self, in_features: int) -> int:
        """How many groups a row of ``in_features`` has; raises ConfigError when the group does not divide the row."""
        group = self.group(in_features)
        if in_features % group:
            raise ConfigError(
                f"group_size={group} does not divide a row of {in_features}.", "choose a group size that divides it."
            )
        return in_features // group

    @property
    def implied_zero_point(self) -> int:
        """The code that stands for zero on the symmetric int grid."""
        return 1 << (self.bits - 1)

    @property
    def label(self) -> str:
        """Short name for tables: ``int4 sym g32``, ``nf4 g64 dq``, ``int8 sym per-channel``."""
        group = "per-channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        if self.grid == "int":
            return f"int{self.bits} {'sym' if self.symmetric else 'asym'} {group}"
        return f"{self.grid} {group}{' dq' if self.double_quant else ''}"

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Stored bits per weight: codes, scales and zero points (arrays of 256 scales share a float32 when nested)."""
        group = self.group(in_features)
        if self.grid != "int":
            per_scale = 8 + 32 / DOUBLE_QUANT_BLOCK if self.double_quant else 32.0
            return self.bits + per_scale / group
        return self.bits + (scale_bits + (0 if self.symmetric else self.bits)) / group


def levels(grid: GridName, device: torch.device | str | None = None) -> torch.Tensor:
    """The 16 levels of a table grid as float32 ``[16]`` in code order; raises ConfigError for ``int``."""
    if grid == "nf4":
        return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)
    if grid == "fp4":
        return torch.tensor(FP4_LEVELS, dtype=torch.float32, device=device)
    raise ConfigError(f"grid {grid!r} has no table of levels.", "use nf4 or fp4.")


def decode(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """Values of codes, in float32: the definition that every kernel is held to.

    Args:
        codes: uint8 ``[out, in]``, one code per element.
        scale: floating ``[out, in/group]``.
        zero_point: uint8 ``[out, in/group]`` or None on symmetric and table grids.
        scheme: the grid and its group size.

    Returns:
        float32 ``[out, in]``.
    """
    rows, columns = codes.shape
    grouped = codes.view(rows, -1, scheme.group(columns))
    if scheme.grid == "int":
        zero = scheme.implied_zero_point if zero_point is None else zero_point.to(torch.float32).unsqueeze(-1)
        values = grouped.to(torch.float32).sub_(zero)
    else:
        values = levels(scheme.grid, codes.device)[grouped.to(torch.int32)]
    return values.mul_(scale.to(torch.float32).unsqueeze(-1)).view(rows, columns)
