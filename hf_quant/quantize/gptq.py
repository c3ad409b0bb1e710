"""Hessian-guided rounding: column by column, with the error of each carried over to the columns still to come.

GPTQ (arXiv:2210.17323) minimises tr(E H E^T), E the error of the weight and H = X^T X of the layer's inputs, by
rounding one column after another and moving what was lost to the columns not yet rounded. Three things are added:

* groups of the most active inputs come first, and within a group its most active columns (act-order), but a group's
  columns stay together, so the stored layout needs no permutation;
* scale and zero point of a group are searched when its turn comes, on the weights as compensated so far, and with the
  weights that the loss itself puts on its columns;
* scales that are stored rounded (bfloat16, or nested 8-bit codes) are rounded before the codes are chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from hf_quant.errors import CalibrationError
from hf_quant.grids import Scheme
from hf_quant.quantize.double_quant import nest
from hf_quant.quantize.rounding import Grid, reciprocal
from hf_quant.quantize.search import search_scales
from hf_quant.tensor import QuantizedTensor

DAMPING = 0.01  # share of the mean of H's diagonal that is added to it
DAMPINGS = (0.01, 0.04, 0.16)  # what best_damping chooses from
JUDGED_ROWS = 64  # of a weight, spread over it, by which a damping is chosen
ATTEMPTS = 7  # each with ten times the damping of the one before


@dataclass(frozen=True)
class Factor:
    """A Hessian made ready for rounding; shared by all layers that have the same input.

    Attributes:
        order: int64 ``[in]``, the columns in the order of their turn.
        groups: the groups in the order of their turn.
        upper: float32 ``[in, in]``, U with inverse(H) = U^T U, in that order.
        damping: what was added to the diagonal, as a share of its mean.
    """

    order: torch.Tensor
    groups: tuple[int, ...]
    upper: torch.Tensor
    damping: float


@dataclass(frozen=True)
class Rounded:
    """A weight rounded under a Hessian.

    Attributes:
        tensor: codes and scales.
        loss: tr(E H E^T) under the damped H that the rounding worked with, in units of H.
    """

    tensor: QuantizedTensor
    loss: float


def factorize(hessian: torch.Tensor, group: int, name: str, damping: float = DAMPING) -> Factor:
    """Order and factor of ``hessian [in, in]`` (float32, symmetric, positive semi-definite) for groups of ``group``.

    Inputs that were always zero, and Hessians of too few tokens to have full rank, are damped until they factor.

    Raises:
        CalibrationError: the Hessian holds NaN or Inf.
    """
    diagonal = hessian.diagonal()
    if not torch.isfinite(diagonal.sum()):
        raise CalibrationError(
            f"the inputs of {name} on the calibration data are not finite.",
            "check that the float model runs on this data (in float32) without overflow.",
        )
    activity = diagonal.view(-1, group)
    groups = activity.sum(1).argsort(descending=True, stable=True)
    within = activity.argsort(dim=1, descending=True, stable=True)
    order = (within + torch.arange(len(groups), device=hessian.device).unsqueeze(1) * group)[groups].reshape(-1)
    mean = float(diagonal.mean()) or 1.0
    # in units that keep float32 from overflowing; powers of four change nothing else
    half = round(math.log2(mean) / 2)
    arranged = torch.ldexp(hessian[order][:, order], torch.tensor(-2 * half))
    mean = math.ldexp(mean, -2 * half)
    before = arranged.diagonal().clone()
    share = damping
    for _ in range(ATTEMPTS):
        arranged.diagonal().copy_(before + share * mean)
        lower, failed = torch.linalg.cholesky_ex(arranged)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper.diagonal().sum()):
                return Factor(order, tuple(groups.tolist()), torch.ldexp(upper, torch.tensor(-half)), share)
        share *= 10
    raise CalibrationError(
        f"the inputs of {name} on the calibration data cannot be factored.", "calibrate on more and longer samples."
    )


def round_weight(
    weight: torch.Tensor,
    scheme: Scheme,
    factor: Factor,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Rounded:
    """Quantize ``weight [out, in]`` (float32) under a factored Hessian.

    Args:
        weight: the target: the float weight, or what should stand in its place.
        scheme: the grid; its group is the one that the factor was made for.
        factor: of the layer's inputs.
        scale_dtype: dtype of the stored scales on the int grids (table grids store float32 or nested scales).
    """
    stored = scale_dtype if scheme.grid == "int" else torch.float32
    pass_ = _Pass(weight, scheme, factor, stored)
    codes, scale, zero, loss = pass_.run(None, None)
    if not scheme.double_quant:
        kept = None if zero is None else zero.to(torch.uint8)
        return Rounded(QuantizedTensor.from_codes(codes, scale.to(stored), kept, scheme), loss)
    # nested scales depend on each other, so they are known only when all are: round again, to the scales as stored
    nested = nest(scale)
    codes, _, _, loss = pass_.run(nested.scale(), None)
    return Rounded(QuantizedTensor.from_codes(codes, nested, None, scheme), loss)


def best_damping(
    weight: torch.Tensor,
    scheme: Scheme,
    seen: torch.Tensor,
    held_out: torch.Tensor,
    name: str,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> float:
    """The damping under which rounding with one Hessian leaves the smallest error under another.

    A Hessian of few tokens has directions that the model hardly uses only by accident; rounding puts its errors there.
    More damping trusts it less. Judged on some rows of the weight.

    Args:
        weight: float32 ``[out, in]``, the target of the rounding.
        scheme: the grid.
        seen: float32 ``[in, in]``, Hessian of the calibration tokens.
        held_out: float32 ``[in, in]``, of other tokens; all zeros where there are none.
        name: of the layer, for errors.
        scale_dtype: as in :func:`round_weight`.
    """
    if not torch.any(held_out) or not torch.any(seen):
        return DAMPING
    step = max(1, len(weight) // JUDGED_ROWS)
    rows = weight[::step].contiguous()
    losses = [held_out_loss(rows, scheme, seen, held_out, name, damping, scale_dtype) for damping in DAMPINGS]
    return DAMPINGS[losses.index(min(losses))]


def held_out_loss(
    rows: torch.Tensor,
    scheme: Scheme,
    seen: torch.Tensor,
    held_out: torch.Tensor,
    name: str,
    damping: float,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> float:
    """tr(E H E^T) with H the Hessian of held-out tokens, E the error of rounding under the one of other tokens.

    Arguments as for :func:`best_damping`. Double-quantized scales are judged as plain ones.
    """
    plain = replace(scheme, double_quant=False)
    factor = factorize(seen, scheme.group(rows.shape[1]), name, damping)
    error = round_weight(rows, plain, factor, scale_dtype=scale_dtype).tensor.dequantize() - rows
    return float(((error @ held_out) * error).sum())


class _Pass:
    """One weight with its factor; :meth:`run` goes once through all columns."""

    def __init__(self, weight: torch.Tensor, scheme: Scheme, factor: Factor, stored: torch.dtype) -> None:
        self.weight, self.scheme, self.factor, self.stored = weight, scheme, factor, stored
        self.group = scheme.group(weight.shape[1])
        self.grid = Grid(scheme, weight.device)

    def run(
        self, scale: torch.Tensor | None, zero: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]:
        """Codes ``[out, in]``, scale and zero ``[out, groups]``, loss; scales are searched where none are given."""
        rows, columns = self.weight.shape
        # one column of the weight per row here: contiguous, as each is worked on by itself
        work = self.weight.t()[self.factor.order].contiguous()
        codes = torch.empty(columns, rows, dtype=torch.uint8, device=work.device)
        scales = torch.empty(rows, columns // self.group, device=work.device)
        zeros = None if self.scheme.symmetric else torch.empty_like(scales)
        loss = 0.0
        for turn, index in enumerate(self.factor.groups):
            span = slice(turn * self.group, (turn + 1) * self.group)
            upper = self.factor.upper[span, span]
            if scale is None:
                found, offset = self._search(work[span], upper)
            else:
                found, offset = scale[:, index], None if zero is None else zero[:, index]
            scales[:, index] = found
            if zeros is not None and offset is not None:
                zeros[:, index] = offset
            error = self._round(work[span], upper, found, offset, codes[span])
            loss += float(error.square().sum())
            work[span.stop :].addmm_(self.factor.upper[span, span.stop :].t(), error, alpha=-1)
        back = torch.empty_like(codes)
        back[self.factor.order] = codes
        return back.t().contiguous(), scales, zeros, loss

    def _search(self, columns: torch.Tensor, upper: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales as stored, and zero points, of one group: ``columns [group, out]``.

        Once its error is carried over, a column's squared error counts 1 / U_jj^2 in the loss.
        """
        groups = columns.t().contiguous()
        pivots = upper.diagonal()
        importance = (pivots.min() / pivots).square().expand_as(groups)
        scale, zero = search_scales(groups, self.scheme, importance, unbiased=False)
        limit = torch.finfo(self.stored).max
        return scale.clamp(-limit, limit).to(self.stored).to(torch.float32), zero

    def _round(
        self,
        columns: torch.Tensor,
        upper: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        codes: torch.Tensor,
    ) -> torch.Tensor:
        """Round ``columns [group, out]`` one by one into ``codes``; returns their weighted errors ``[group, out]``."""
        inverse = reciprocal(scale)
        errors = torch.empty_like(columns)
        pivots = upper.diagonal().tolist()
        for j, pivot in enumerate(pivots):
            column = columns[j]
            value = self.grid.round(column * inverse, zero, codes[j])
            error = torch.addcmul(column, value, scale, value=-1, out=errors[j]).div_(pivot)
            if j + 1 < len(pivots):
                columns[j + 1 :].addr_(upper[j, j + 1 :], error, alpha=-1)
        return errors
