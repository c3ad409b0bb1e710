"""Budgets of accuracy: allocate, quantize, measure on held-out data, adjust, within a bounded number of tries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_quant.errors import BudgetError
from hf_quant.quantize.allocate import Allocation, Budget, ParetoPoint, allocate
from hf_quant.quantize.menu import Menu
from hf_quant.quantize.sensitivity_record import Sensitivity

TRIES = 4
CLOSE = 0.9  # a try that uses this much of the budget is not worth another one
AIM = 0.96  # the next try aims a little below the limit, as its prediction has an error too
_LEAST = 1e-3  # of the limit: what a measurement counts at least (a perplexity can fall)


@dataclass(frozen=True)
class Measurement:
    """What a quantized model loses on held-out data.

    Attributes:
        kl: KL(float || quantized), nats per token.
        loss_increase: log(perplexity / perplexity of the float model), nats per token; may be negative.
    """

    kl: float
    loss_increase: float = 0.0


@dataclass(frozen=True)
class Attempt:
    """One try: the allocation (``predicted_kl`` by the sensitivities alone), what was measured, whether it fits."""

    allocation: Allocation
    measured: Measurement
    fits: bool


@dataclass(frozen=True)
class FittedBudget:
    """The outcome.

    Attributes:
        allocation: the one of fewest bits whose measurement satisfies the budget; its predictions carry ``factor``.
        measured: of it; None for budgets of bits and bytes, which need no measurement.
        factor: measured over predicted.
        attempts: every try, in order.
    """

    allocation: Allocation
    measured: Measurement | None
    factor: float
    attempts: tuple[Attempt, ...]

    @property
    def best_attempt(self) -> int | None:
        """Index of the attempt that was kept; None when nothing was measured."""
        return next((i for i, a in enumerate(self.attempts) if a.measured is self.measured), None)


def fit_budget(
    menu: Menu,
    sensitivity: Sensitivity,
    budget: Budget,
    quantize_and_measure: Callable[[Mapping[str, Mapping[str, Any] | str]], Measurement],
    *,
    factor: float = 1.0,
    tries: int = TRIES,
    progress: Callable[[Attempt], None] | None = None,
) -> FittedBudget:
    """Find the allocation of fewest bits whose measured loss is within the budget.

    Each try is aimed by the ones before it: one gives a factor between the predicted and the measured loss, two give a
    power law through the nearest tries on either side of the limit. Budgets of bits and bytes are allocated once and
    not measured.

    Args:
        menu: layers and schemes.
        sensitivity: of the same model.
        budget: the limit.
        quantize_and_measure: exact-name overrides -> what the model quantized with them loses on held-out data.
        factor: first guess of measured over predicted (calibrated rounding loses less than predicted: below 1).
        tries: most calls of ``quantize_and_measure``.
        progress: called after every try.

    Raises:
        BudgetError: no try satisfied the budget (names the closest), the measurement is not finite, or as
            :func:`allocate`.
    """
    if not budget.is_measured:
        return FittedBudget(allocate(menu, sensitivity, budget, factor), None, factor, ())
    attempts: list[Attempt] = []
    points: list[tuple[float, float]] = []  # (predicted, measured) per try
    aim = budget.limit / factor
    while len(attempts) < max(1, tries):
        allocation = _untried(menu, sensitivity, budget, aim, attempts)
        if allocation is None:
            break
        measured = quantize_and_measure(allocation.overrides)
        value = measured.kl if budget.kind == "max_kl" else measured.loss_increase
        if not math.isfinite(value):
            raise BudgetError(f"the quantized model's measured loss is {value}.", "check the held-out data.")
        attempts.append(Attempt(allocation, measured, value <= budget.limit))
        points.append((allocation.predicted_kl, max(value, _LEAST * budget.limit)))
        if progress is not None:
            progress(attempts[-1])
        if CLOSE * budget.limit <= value <= budget.limit:
            break
        aim = _aim(points, budget.limit)
    fitting = [i for i, attempt in enumerate(attempts) if attempt.fits]
    if not fitting:
        value, bits = min((points[i][1], a.allocation.bits_per_weight) for i, a in enumerate(attempts))
        raise BudgetError(
            f"{budget.kind}={budget.text} was not reached in {len(attempts)} tries: the closest lost {value:.4g} nats "
            f"per token at {bits:.3f} bits per weight, and the budget is {budget.limit:.4g}.",
            "allow more, use a more accurate preset, or allow more tries.",
        )
    best = min(fitting, key=lambda i: (attempts[i].allocation.bits_per_weight, points[i][1]))
    found = points[best][1] / points[best][0] if points[best][0] > 0 else 1.0
    return FittedBudget(_scaled(attempts[best].allocation, found), attempts[best].measured, found, tuple(attempts))


def _untried(
    menu: Menu, sensitivity: Sensitivity, budget: Budget, aim: float, attempts: list[Attempt]
) -> Allocation | None:
    """The allocation for a prediction of ``aim``; None when trying it can teach nothing new."""
    while True:
        try:
            allocation = allocate(menu, sensitivity, replace(budget, limit=aim))
        except BudgetError:
            if not attempts:
                raise
            return None  # the fitted prediction says that nothing satisfies the budget: report what was measured
        tried = [attempt for attempt in attempts if attempt.allocation.choices == allocation.choices]
        if not tried:
            return allocation
        if tried[0].fits:
            return None
        # the schemes are few: go down to the next better allocation
        aim = min(aim, allocation.predicted_kl) * 0.99


def _aim(points: list[tuple[float, float]], limit: float) -> float:
    """The prediction at which the measurement is expected to be just below ``limit``."""
    points = [(p, m) for p, m in points if p > 0] or [(limit, limit)]
    below = max((point for point in points if point[1] <= limit), default=None)
    above = min((point for point in points if point[1] > limit), default=None)
    if below is not None and above is not None and below[0] < above[0]:
        low, high = (math.log(below[0]), math.log(below[1])), (math.log(above[0]), math.log(above[1]))
        share = (math.log(AIM * limit) - low[1]) / (high[1] - low[1])
        return math.exp(low[0] + min(max(share, 0.05), 0.95) * (high[0] - low[0]))
    predicted, measured = below or above or points[-1]
    # far from the limit the measurement grows a little faster than the prediction: do not jump more than tenfold
    return predicted * min(max(AIM * limit / measured, 0.1), 10.0)


def _scaled(allocation: Allocation, factor: float) -> Allocation:
    curve = tuple(ParetoPoint(p.bits_per_weight, p.nbytes, factor * p.predicted_kl) for p in allocation.curve)
    return replace(allocation, predicted_kl=factor * allocation.predicted_kl, curve=curve)
