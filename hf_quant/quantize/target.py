"""What a weight should become so that, on the quantized model's inputs, its layer gives the float model's outputs.

With X the layer's inputs in the float model, Z those in the model quantized so far, W the float weight, and R and S the
float and quantized residual streams that the output is added to, the weight V that brings the sum closest to the float
model's minimises |Z V^T + S - X W^T - R|^2:

    V = W + D,   (Z^T Z + damping) D^T = Z^T (X - Z) W^T + Z^T (R - S)

Aiming at the float outputs is the asymmetric calibration of GPTAQ (arXiv:2504.02692) and the error propagation of QEP
(arXiv:2504.09629); the residual term lets a layer also undo what the layers before it did to the stream. How much of
that holds beyond the calibration tokens is measured, not assumed: the damping is the one that does best on held-out
tokens, and when none of them beats the plain weight, the plain weight is the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_quant.calibration.statistics import Moments

JUDGED = 128  # outputs by which a damping is chosen, spread over the weight
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # shares of the mean of the Hessian's diagonal


@dataclass(frozen=True)
class Target:
    """The weight to round.

    Attributes:
        weight: float32 ``[out, in]``.
        damping: that of the correction; None when the float weight is the target.
        gain: squared output error (before any rounding) that the correction removed on held-out tokens, as a share of
            the squared output.
    """

    weight: torch.Tensor
    damping: float | None
    gain: float


def correct(weight: torch.Tensor, seen: Moments, held_out: Moments) -> Target:
    """The target for ``weight [out, in]`` (float32) from the moments of its inputs on two disjoint sets of tokens."""
    if not seen.tokens or not held_out.tokens:
        return Target(weight, None, 0.0)
    wanted, judge = _right_side(weight, seen), _right_side(weight, held_out)
    some = slice(None, None, max(1, len(weight) // JUDGED))
    best, score = None, 0.0
    for damping in DAMPINGS:
        change = _solve(seen.hessian, wanted[:, some], damping)
        if change is None:
            continue
        # the held-out squared error, less what it is with no correction
        moved = float(((held_out.hessian @ change) * change).sum() - 2 * (judge[:, some] * change).sum())
        if moved < score:
            best, score = damping, moved
    if best is None:
        return Target(weight, None, 0.0)
    change = _solve(seen.hessian + held_out.hessian, wanted + judge, best)
    if change is None:
        return Target(weight, None, 0.0)
    rows = weight[some]
    size = float(((held_out.hessian @ rows.t()) * rows.t()).sum())
    return Target(weight + change.t(), best, -score / max(size, torch.finfo(torch.float32).tiny))


def _right_side(weight: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Z^T (X W^T + R - Z W^T - S): float32 ``[in, out]``."""
    found = moments.drift @ weight.t()
    return found if moments.residual is None else found + moments.residual


def _solve(hessian: torch.Tensor, wanted: torch.Tensor, damping: float) -> torch.Tensor | None:
    """The correction ``[in, out]``, or None where the damped Hessian cannot be factored."""
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return None
    change = torch.cholesky_solve(wanted, lower)
    return change if torch.isfinite(change.sum()) else None
