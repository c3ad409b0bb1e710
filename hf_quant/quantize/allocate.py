"""Budgets: choose a scheme per layer so that the predicted KL is least within the bytes, or the bytes within the KL."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hf_quant.config import HfQuantConfig
from hf_quant.errors import BudgetError
from hf_quant.grids import Scheme
from hf_quant.quantize.knapsack import Front, least_cost, pareto_front
from hf_quant.quantize.menu import FLOAT_LABEL, Choice, LayerMenu, Menu, apply_overrides, override
from hf_quant.quantize.sensitivity_record import Sensitivity

BudgetKind = Literal["target_bits", "max_size", "max_kl", "max_ppl_increase"]
CURVE_POINTS = 64
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Budget:
    """One limit.

    Attributes:
        kind: ``target_bits`` (bits per weight averaged over the layers of the menu: codes, scales and zero points; 16
            for a weight in float), ``max_size`` (bytes of the whole checkpoint's weight files), ``max_kl`` (nats per
            token), ``max_ppl_increase`` (nats of loss per token: ``log(1 + increase)``).
        limit: in that unit, positive.
        text: as the user wrote it.
    """

    kind: BudgetKind
    limit: float
    text: str

    @property
    def is_measured(self) -> bool:
        """Whether only a measurement can say that it is kept (bits and bytes are known beforehand)."""
        return self.kind in ("max_kl", "max_ppl_increase")

    @classmethod
    def parse(
        cls,
        target_bits: float | str | None = None,
        max_size: int | str | None = None,
        max_kl: float | str | None = None,
        max_ppl_increase: float | str | None = None,
    ) -> Budget | None:
        """The budget that was asked for; None when none was.

        Args:
            target_bits: ``4.25``.
            max_size: bytes, or a text as ``900MB``, ``1.2GB`` (powers of 1000), ``700MiB`` (powers of 1024).
            max_kl: nats per token, ``0.05``.
            max_ppl_increase: ``1%``, or the fraction ``0.01``.

        Raises:
            BudgetError: more than one, or a value that cannot be read or is not positive.
        """
        given: dict[BudgetKind, float | int | str] = {}
        for kind, value in zip(_READERS, (target_bits, max_size, max_kl, max_ppl_increase), strict=True):
            if value is not None:
                given[kind] = value
        if not given:
            return None
        if len(given) > 1:
            raise BudgetError(f"{' and '.join(given)} are given together.", "give one budget.")
        kind, value = next(iter(given.items()))
        read, form = _READERS[kind]
        limit = read(str(value).strip())
        if limit is None or not math.isfinite(limit) or limit <= 0:
            raise BudgetError(f"{kind}={value!r} is not {form}.", f"write {form}.")
        return cls(kind, limit, str(value).strip())

    def record(self) -> dict[str, Any]:
        """For the provenance."""
        return {"kind": self.kind, "limit": self.limit, "text": self.text}


@dataclass(frozen=True)
class ParetoPoint:
    """One allocation on the curve: average bits (float counts 16), bytes of the checkpoint, nats per token."""

    bits_per_weight: float
    nbytes: int
    predicted_kl: float


@dataclass(frozen=True)
class Allocation:
    """A scheme for every layer of the menu.

    Attributes:
        choices: name -> scheme, None for float.
        predicted_kl: nats per token.
        bits_per_weight: average over every layer of the menu, where float counts 16: what ``target_bits`` limits.
        quantized_bits_per_weight: average over the quantized layers only: what the plan and the card report.
        nbytes: of the checkpoint's weight files, at most (the length of their headers is bounded, the rest is exact).
        curve: the best that any allocation predicts, from the smallest to the largest; at most 64 points.
    """

    choices: dict[str, Scheme | None]
    predicted_kl: float
    bits_per_weight: float
    quantized_bits_per_weight: float
    nbytes: int
    curve: tuple[ParetoPoint, ...]

    @property
    def overrides(self) -> dict[str, dict[str, Any] | str]:
        """Exact-name overrides for :class:`HfQuantConfig`."""
        return {name: override(scheme) for name, scheme in self.choices.items()}

    def apply(self, config: HfQuantConfig) -> HfQuantConfig:
        """``config`` with these overrides added to its own."""
        return apply_overrides(config, self.overrides)

    def counts(self) -> dict[str, int]:
        """How many layers are stored in which way, by label."""
        return dict(Counter(scheme.label if scheme else FLOAT_LABEL for scheme in self.choices.values()).most_common())


def allocate(menu: Menu, sensitivity: Sensitivity, budget: Budget, factor: float = 1.0) -> Allocation:
    """The best allocation within ``budget``.

    Bits and size budgets minimise the predicted KL, accuracy budgets the bits. An accuracy budget is held against the
    prediction alone: :func:`hf_quant.quantize.fit_budget.fit_budget` measures.

    Args:
        menu: of :func:`hf_quant.quantize.menu.make_menu`.
        sensitivity: of the same model and schemes.
        budget: the limit.
        factor: measured over predicted, for ``max_kl`` and ``max_ppl_increase`` and for the KL that is reported.

    Raises:
        BudgetError: no allocation satisfies the budget, or the float model itself does: names the least or the most
            that is possible.
        SensitivityError: the sensitivities lack a layer or a scheme of the menu.
    """
    by_size = budget.kind == "max_size"
    items, sets = _items(menu, sensitivity, by_size)
    front = pareto_front(items)
    if budget.is_measured:
        picks = least_cost([[(cost, weight) for weight, cost in options] for options in items], budget.limit / factor)
    else:
        picks = least_cost(items, _weight_limit(menu, budget), front=front)
    if picks is None:
        raise BudgetError(*_impossible(menu, front, budget, factor))
    chosen = _chosen(picks, sets)
    if all(scheme is None for scheme in chosen.values()):
        raise BudgetError(*_needless(menu, budget))
    curve = tuple(_point(menu, sensitivity, _chosen(front.picks(i), sets), factor) for i in _spread(front))
    point = _point(menu, sensitivity, chosen, factor)
    ordered = {layer.name: chosen[layer.name] for layer in menu.layers}
    return Allocation(
        ordered, point.predicted_kl, point.bits_per_weight, _quantized_bits(menu, ordered), point.nbytes, curve
    )


def _items(
    menu: Menu, sensitivity: Sensitivity, by_size: bool
) -> tuple[list[list[tuple[float, float]]], list[list[LayerMenu]]]:
    """(weight, cost) of every option of every set of layers that share one, and the sets."""
    layers = {layer.name: layer for layer in menu.layers}
    sets = [[layers[name] for name in names] for names in menu.together]
    items = [
        [
            (
                sum(_weight(layer.choice(offered.scheme), by_size) for layer in members),
                sum(sensitivity.cost(layer.name, offered.label) for layer in members),
            )
            for offered in members[0].choices
        ]
        for members in sets
    ]
    return items, sets


def _spread(front: Front) -> list[int]:
    """Points of the front for a plot: evenly spread over the logarithm of the weight, where the loss changes most."""
    if len(front.weights) <= CURVE_POINTS:
        return list(range(len(front.weights)))
    low, high = math.log(front.weights[0]), math.log(front.weights[-1])
    wanted = [math.exp(low + (high - low) * (i / (CURVE_POINTS - 1)) ** 2) for i in range(CURVE_POINTS)]
    return sorted({0, len(front.weights) - 1, *(front.within_weight(weight) or 0 for weight in wanted)})


def _weight(choice: Choice, by_size: bool) -> float:
    return float(choice.nbytes) if by_size else choice.bits


def _chosen(picks: list[int], sets: list[list[LayerMenu]]) -> dict[str, Scheme | None]:
    return {
        layer.name: members[0].choices[pick].scheme
        for members, pick in zip(sets, picks, strict=True)
        for layer in members
    }


def _point(menu: Menu, sensitivity: Sensitivity, chosen: Mapping[str, Scheme | None], factor: float) -> ParetoPoint:
    picked = [(layer, layer.choice(chosen[layer.name])) for layer in menu.layers]
    return ParetoPoint(
        sum(choice.bits for _, choice in picked) / menu.numel,
        menu.rest_bytes + sum(choice.nbytes for _, choice in picked),
        factor * sum(sensitivity.cost(layer.name, choice.label) for layer, choice in picked),
    )


def _quantized_bits(menu: Menu, chosen: Mapping[str, Scheme | None]) -> float:
    kept = [(layer, layer.choice(chosen[layer.name])) for layer in menu.layers if chosen[layer.name] is not None]
    return sum(choice.bits for _, choice in kept) / sum(layer.numel for layer, _ in kept)


def _weight_limit(menu: Menu, budget: Budget) -> float:
    return budget.limit - menu.rest_bytes if budget.kind == "max_size" else budget.limit * menu.numel


def _impossible(menu: Menu, front: Front, budget: Budget, factor: float) -> tuple[str, str]:
    if budget.kind == "max_size":
        least = menu.rest_bytes + int(front.weights[0])
        return (
            f"max_size={budget.text} is less than the smallest checkpoint, {least:,} bytes, "
            f"of which {menu.rest_bytes:,} stay in float (embeddings, norms, what is skipped).",
            f"allow at least {least} bytes.",
        )
    if budget.kind == "target_bits":
        least_bits = front.weights[0] / menu.numel
        return (
            f"target_bits={budget.text} is less than the cheapest schemes need, {least_bits:.4f} bits per weight.",
            f"allow at least {math.ceil(least_bits * 1e4) / 1e4:g}.",
        )
    best = factor * float(front.costs[-1])
    return (
        f"{budget.kind}={budget.text} ({budget.limit:.3g} nats per token) is less than the most accurate allocation is "
        f"predicted to lose, {best:.3g}.",
        "allow more, or let the budget leave layers in float.",
    )


def _needless(menu: Menu, budget: Budget) -> tuple[str, str]:
    if budget.kind == "max_size":
        return (
            f"max_size={budget.text} holds the whole float model, {menu.float_bytes:,} bytes.",
            "there is nothing to quantize; give a smaller size.",
        )
    if budget.kind == "target_bits":
        return f"target_bits={budget.text} leaves every layer in float.", "give less than 16."
    return (
        f"{budget.kind}={budget.text} leaves every layer in float: quantizing any of them is predicted to cost more.",
        "allow more.",
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _size(text: str) -> float | None:
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?I?)B?", text.upper().replace("_", ""))
    if match is None or (match[2] not in _UNITS and match[2] not in _BINARY):
        return None
    return float(match[1]) * {**_UNITS, **_BINARY}[match[2]]


def _increase(text: str) -> float | None:
    percent = _number(text.removesuffix("%").strip())
    if percent is None:
        return None
    fraction = percent / 100 if text.endswith("%") else percent
    return math.log1p(fraction) if fraction > -1 else None


_READERS: dict[BudgetKind, tuple[Any, str]] = {
    "target_bits": (_number, "a positive number of bits, for example 4.25"),
    "max_size": (_size, "a size, for example 900MB, 1.2GB or 700MiB"),
    "max_kl": (_number, "a positive number of nats per token, for example 0.05"),
    "max_ppl_increase": (_increase, "a positive increase, for example 1% or 0.01"),
}
