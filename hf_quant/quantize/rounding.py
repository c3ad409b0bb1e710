"""Nearest codes for given scales: the last step of every method, exact for the scales as they are stored."""

from __future__ import annotations

from functools import lru_cache

import torch

from hf_quant.grids import GridName, Scheme, levels

CELLS = 4096  # of the fast look-up over [-1, 1]; the smallest distance between two levels (fp4) spans ten of them


def reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where the scale is zero or too small to invert: such groups get the zero code."""
    return scale.reciprocal().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def nearest_values(
    groups: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: Scheme,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The grid values at scale one nearest to each weight; works for any sign of the scale.

    Exact on int grids. On table grids a weight within 1/4096 of the midpoint of two levels may get either of them: use
    :func:`nearest_codes` for codes that are kept.

    Args:
        groups: float32 ``[n, group]``.
        scale: float32 ``[n]``.
        zero: float32 integral zero point ``[n]``, or None for the grid's own.
        scheme: the grid.
        out: float32 ``[n, group]`` to write into.

    Returns:
        float32 ``[n, group]``.
    """
    scaled = torch.mul(groups, reciprocal(scale).unsqueeze(1), out=out)
    if scheme.grid == "int":
        steps = 2**scheme.bits - 1
        if zero is None:
            return scaled.round_().clamp_(-scheme.implied_zero_point, steps - scheme.implied_zero_point)
        return scaled.round_().clamp_(-zero.unsqueeze(1), (steps - zero).unsqueeze(1))
    cells = scaled.mul_(CELLS / 2).add_(CELLS / 2 + 0.5).clamp_(0, CELLS).to(torch.int32)
    return _cell_values(scheme.grid).to(groups.device).index_select(0, cells.view(-1)).view_as(groups)


def nearest_codes(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """The code whose value is nearest to each weight: uint8 ``[n, group]``; arguments as :func:`nearest_values`."""
    if scheme.grid == "int":
        shift = scheme.implied_zero_point if zero is None else zero.unsqueeze(1)
        return nearest_values(groups, scale, zero, scheme).add_(shift).to(torch.uint8)
    scaled = groups * reciprocal(scale).unsqueeze(1)
    boundaries, order = _midpoints(scheme.grid)
    ranks = torch.bucketize(scaled, boundaries.to(groups.device), out_int32=True)
    return order.to(groups.device).index_select(0, ranks.view(-1)).view_as(ranks)


def values(codes: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """What codes stand for at scale one: float32 ``[n, group]``."""
    if scheme.grid == "int":
        return codes.to(torch.float32).sub_(scheme.implied_zero_point if zero is None else zero.unsqueeze(1))
    return levels(scheme.grid, codes.device)[codes.to(torch.int32)]


class Grid:
    """Rounds one column after another onto the grid of a scheme: exact, and with the codes that are kept."""

    def __init__(self, scheme: Scheme, device: torch.device) -> None:
        self.steps = 2**scheme.bits - 1
        self.middle = scheme.implied_zero_point
        self.table: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        if scheme.grid != "int":
            boundaries, order = _midpoints(scheme.grid)
            ordered = levels(scheme.grid)[order.to(torch.int64)]
            self.table = (boundaries.to(device), order.to(device), ordered.to(device))

    def round(self, scaled: torch.Tensor, zero: torch.Tensor | None, codes: torch.Tensor) -> torch.Tensor:
        """The nearest values at scale one, and their codes.

        Args:
            scaled: float32 ``[n]``, the weights divided by their scale; overwritten on the int grids.
            zero: float32 integral zero point ``[n]``, or None for the grid's own.
            codes: uint8 ``[n]``, written.

        Returns:
            float32 ``[n]``.
        """
        if self.table is not None:
            boundaries, order, ordered = self.table
            ranks = torch.bucketize(scaled, boundaries, out_int32=True)
            codes.copy_(order.index_select(0, ranks))
            return ordered.index_select(0, ranks)
        if zero is None:
            value = scaled.round_().clamp_(-self.middle, self.steps - self.middle)
            codes.copy_(value + self.middle)
        else:
            value = scaled.round_().clamp_(-zero, self.steps - zero)
            codes.copy_(value + zero)
        return value


@lru_cache(maxsize=4)
def _midpoints(grid: GridName) -> tuple[torch.Tensor, torch.Tensor]:
    """Midpoints between the sorted levels ``[15]``, and the code of each sorted level ``[16]`` uint8."""
    ordered, order = torch.sort(levels(grid), stable=True)
    return (ordered[1:] + ordered[:-1]) / 2, order.to(torch.uint8)


@lru_cache(maxsize=4)
def _cell_values(grid: GridName) -> torch.Tensor:
    """The level nearest to each cell's centre, ``[CELLS + 1]`` over [-1, 1]."""
    centres = torch.linspace(-1, 1, CELLS + 1)
    boundaries, order = _midpoints(grid)
    return levels(grid)[order.to(torch.int64)[torch.bucketize(centres, boundaries)]]
