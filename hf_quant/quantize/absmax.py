"""Round to nearest with scales from the extreme weights: the baseline every other method is measured against."""

from __future__ import annotations

import torch

from hf_quant.grids import Scheme


def absmax_scales(groups: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales (and zero points) of weight groups from their extremes.

    Symmetric int: scale = max|w| / (2**(bits-1) - 1). Asymmetric int: the range of the weights, widened to hold zero,
    over 2**bits - 1 steps (min/max). Table grids: max|w|, as bitsandbytes' absmax.

    Args:
        groups: float32 ``[n, group]``.
        scheme: the grid.

    Returns:
        float32 scale ``[n]``, and float32 integral zero point ``[n]`` on the asymmetric grid, else None.
    """
    low, high = torch.aminmax(groups, dim=1)
    if scheme.symmetric:
        peak = torch.maximum(high, -low)
        return (peak / (scheme.implied_zero_point - 1) if scheme.grid == "int" else peak), None
    steps = 2**scheme.bits - 1
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    scale = (high - low) / steps
    zero = torch.where(scale > 0, -low / scale, torch.zeros_like(scale)).round_().clamp_(0, steps)
    return scale, zero
