"""Adaptive scales: a per-group search over scale and zero point, with codes and scales refined together.

For fixed codes c (values at scale one) the best scale of a group w is the weighted least-squares fit
s = <w, c> / <c, c>, and it leaves the error <w, w> - <w, c>^2 / <c, c>. So a candidate is judged by <w, c>^2 / <c, c>
alone, with no reconstruction. Candidates stretch or clip the range of the group, with both signs of the scale: the
grids are lopsided (int4 has -8 but not +8, NF4 has eight positive levels and seven negative), and a negative scale
turns them round. The winner is refined by alternating nearest codes and least-squares scales (a Lloyd iteration on a
fixed grid).

The scale that is kept is not the least-squares one but <w, w> / <w, c>: a least-squares fit always shrinks the group
(by the share of its energy that is lost), and such an error points the same way in every group, where rounding errors
have random signs and average out in a dot product. The ranking of the candidates is the same for both. With zero
points, where both ends of the range can be clipped, the error of large weights also counts a little more.
"""

from __future__ import annotations

import torch

from hf_quant.grids import Scheme
from hf_quant.quantize.rounding import nearest_values, reciprocal

REFINE_STEPS = 2
TILT = 4.0  # importance on the asymmetric grid is |w| + TILT * rms(group)
# Where the largest weight of a group lands, as a share of the grid's end: below 1 wastes levels, above 1 clips.
_STRETCH = {
    ("int", 4): tuple(0.7 + 0.05 * i for i in range(10)),
    ("int", 8): (0.98, 0.99, 1.0, 1.01, 1.03),
    ("nf4", 4): tuple(0.85 + 0.05 * i for i in range(9)),
    ("fp4", 4): tuple(0.7 + 0.07 * i for i in range(10)),
}
# Asymmetric: shrink the low and the high end of the range independently.
_SHRINK = {4: (1.0, 0.92, 0.84, 0.76), 8: (1.0, 0.99)}


def search_scales(
    groups: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None, *, unbiased: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales (and zero points) that minimise the squared error of each group, weighted by ``importance``.

    Args:
        groups: float32 ``[n, group]``.
        scheme: the grid.
        importance: float32 ``[n, group]`` or broadcastable, positive; see :func:`default_importance`.
        unbiased: keep the group's length (above); False keeps the least-squares scale, for a caller that carries the
            error of each weight over to others.

    Returns:
        float32 scale ``[n]`` (any sign), and float32 integral zero point ``[n]`` on the asymmetric grid, else None.
    """
    best = _Best(groups, default_importance(groups, scheme) if importance is None else importance, scheme)
    if scheme.grid == "int" and not scheme.symmetric:
        _try_ranges(groups, scheme, best)
    else:
        _try_stretches(groups, scheme, best)
    for _ in range(REFINE_STEPS):
        best.offer(best.scale, best.zero)
    return _unbiased(groups, importance, best) if unbiased else best.scale, best.zero


def _unbiased(groups: torch.Tensor, importance: torch.Tensor | None, best: _Best) -> torch.Tensor:
    """The scale at which the group, projected on itself, keeps its length (rounding again at every step)."""
    weighted = groups if importance is None else groups * importance
    energy = torch.mul(weighted, groups, out=best.work).sum(1)
    scale = best.scale
    for _ in range(REFINE_STEPS):
        candidate = nearest_values(groups, scale, best.zero, best.scheme, out=best.candidate)
        along = torch.mul(weighted, candidate, out=best.work).sum(1)
        scale = torch.where(along != 0, energy / along, scale).nan_to_num_(posinf=0.0, neginf=0.0)
    return scale


def default_importance(groups: torch.Tensor, scheme: Scheme) -> torch.Tensor | None:
    """How much each weight's error counts when no data says so: ``[n, group]``, or None for all alike."""
    if scheme.symmetric:
        return None
    rms = groups.square().mean(dim=1, keepdim=True).sqrt_()
    return groups.abs().add_(rms.mul_(TILT))


class _Best:
    """The best candidate so far, per group."""

    def __init__(self, groups: torch.Tensor, importance: torch.Tensor | None, scheme: Scheme) -> None:
        self.groups, self.importance, self.scheme = groups, importance, scheme
        self.weighted = groups if importance is None else groups * importance
        self.candidate = torch.empty_like(groups)
        self.work = torch.empty_like(groups)
        self.score = groups.new_full((groups.shape[0],), -1.0)
        self.scale = groups.new_zeros(groups.shape[0])
        self.zero: torch.Tensor | None = None

    def offer(self, scale: torch.Tensor, zero: torch.Tensor | None) -> None:
        """Round at ``scale``, refit the scale to those codes, and keep the fit wherever it leaves a smaller error."""
        candidate = nearest_values(self.groups, scale, zero, self.scheme, out=self.candidate)
        along = torch.mul(self.weighted, candidate, out=self.work).sum(1)
        square = torch.mul(candidate, candidate, out=self.work)
        if self.importance is not None:
            square.mul_(self.importance)
        norm = square.sum(1).clamp_(min=torch.finfo(torch.float32).tiny)
        fitted = along / norm
        score = along * fitted
        better = score > self.score
        self.score = torch.where(better, score, self.score)
        self.scale = torch.where(better, fitted, self.scale)
        if zero is not None:
            self.zero = zero.clone() if self.zero is None else torch.where(better, zero, self.zero)


def _try_stretches(groups: torch.Tensor, scheme: Scheme, best: _Best) -> None:
    low, high = torch.aminmax(groups, dim=1)
    peak = torch.where(high > -low, high, low)
    end = float(scheme.implied_zero_point) if scheme.grid == "int" else 1.0
    for sign in (-1.0, 1.0):
        for stretch in _STRETCH[scheme.grid, scheme.bits]:
            best.offer(peak / (sign * stretch * end), None)


def _try_ranges(groups: torch.Tensor, scheme: Scheme, best: _Best) -> None:
    steps = 2**scheme.bits - 1
    low, high = torch.aminmax(groups, dim=1)
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    for shrink_low in _SHRINK[scheme.bits]:
        for shrink_high in _SHRINK[scheme.bits]:
            scale = (high * shrink_high - low * shrink_low) / steps
            zero = (-low * shrink_low * reciprocal(scale)).round_().clamp_(0, steps)
            best.offer(scale, zero)
