"""Closed-form refit: for codes that stay as they are, the scales of a row that are best together.

A row is v = C s, with C ``[in, groups]`` holding the group's values at scale one in its own rows and zeros elsewhere.
The scales that minimise (v - w)^T H (v - w) solve (C^T H C) s = C^T H w. Rounding chose each scale with the columns
still to come in mind; this chooses all of them again now that every code is known.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_quant.quantize.rounding import values
from hf_quant.tensor import QuantizedTensor

RIDGE = 1e-4  # share of each diagonal entry that is added to it
WORK = 1 << 24  # float32 numbers in a work space


def refit_scales(tensor: QuantizedTensor, target: torch.Tensor, hessian: torch.Tensor) -> tuple[QuantizedTensor, float]:
    """Scales that fit ``target [out, in]`` better under ``hessian [in, in]`` (both float32), and the fall of the loss.

    The loss is tr(E H E^T). Rows that do not gain once their scales are rounded to the stored dtype keep what they
    have. Scales that are stored double-quantized are left alone.
    """
    if tensor.scale is None:
        return tensor, 0.0
    rows, columns = tensor.shape
    group = tensor.scheme.group(columns)
    groups = columns // group
    zero = None if tensor.zero_point is None else tensor.zero_point.reshape(-1)
    ones = values(tensor.codes().reshape(-1, group), zero, tensor.scheme).view(rows, groups, group)
    scale = tensor.scale.to(torch.float32)
    pulled = (target @ hessian).view(rows, groups, group)
    found = tensor.scale.clone()
    step = max(1, WORK // (groups * columns))
    total = 0.0
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        some = ones[piece]
        blocks = hessian.view(groups, group, columns)
        # [rows, groups, in]: each group's values through the Hessian, then against every group's values
        through = torch.einsum("rgk,gkc->rgc", some, blocks).view(len(some), groups, groups, group)
        normal = torch.einsum("rghk,rhk->rgh", through, some)
        wanted = (pulled[piece] * some).sum(-1)
        # solved for the change, so that a ridge pulls towards the scales that are there
        before = scale[piece]
        missing = wanted - torch.einsum("rgh,rh->rg", normal, before)
        ridge = normal.diagonal(dim1=1, dim2=2)
        damped = normal + torch.diag_embed(ridge * RIDGE + torch.finfo(torch.float32).tiny)
        lower, failed = torch.linalg.cholesky_ex(damped)
        change = torch.cholesky_solve(missing.unsqueeze(-1), lower).squeeze(-1)
        after = (before + change).to(tensor.scale.dtype)
        moved = after.to(torch.float32) - before
        gain = 2 * (missing * moved).sum(1) - torch.einsum("rg,rgh,rh->r", moved, normal, moved)
        better = (gain > 0) & (failed == 0) & torch.isfinite(moved).all(1)
        found[piece] = torch.where(better.unsqueeze(1), after, tensor.scale[piece])
        total += float(gain[better].sum())
    return replace(tensor, scale=found), total
