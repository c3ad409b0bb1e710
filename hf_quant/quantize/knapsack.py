"""Choose one option per item so that the cost is least within a weight: the Pareto front of all choices.

The multiple-choice knapsack problem, solved in two ways, and the better of both kept at every weight:

* dynamic programming over the items. States are never rounded: a stage that has more of them than ``limit`` keeps, in
  each of ``limit`` equal intervals of weight, the one that costs least. Exact with few items; with many items the
  intervals' losses add up.
* the relaxation (the Lagrangian's solutions): every item moves along the convex hull of its options, the step that
  saves most cost per weight first. Within one step of the optimum, so the better the more items there are.

:func:`least_cost` goes on from there for one limit: what the Lagrangian's bound rules out, given the best choice found,
is left out of the dynamic programme, whose intervals become finer by that, and so on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STATES = 2048
_ROUNDS = 4
_SLACK = 1e-12  # of a limit, for sums that were rounded
_Stage = tuple[NDArray[np.int64], NDArray[np.int64]]  # of every state: the state it came from, the option taken


@dataclass(frozen=True)
class Front:
    """Choices that no other choice found beats in both weight and cost.

    Attributes:
        weights: float64 ``[n]``, ascending.
        costs: float64 ``[n]``, descending.
    """

    weights: NDArray[np.float64]
    costs: NDArray[np.float64]
    _sources: NDArray[np.int64]  # a state of the last stage, or (from _states on) a row of _greedy
    _states: int
    _stages: tuple[_Stage, ...]
    _greedy: NDArray[np.int64]

    def picks(self, index: int) -> list[int]:
        """The option of every item at a point of the front."""
        source = int(self._sources[index])
        if source >= self._states:
            return [int(option) for option in self._greedy[source - self._states]]
        options: list[int] = []
        for parents, chosen in reversed(self._stages):
            options.append(int(chosen[source]))
            source = int(parents[source])
        return options[::-1]

    def within_weight(self, limit: float) -> int | None:
        """The point of least cost whose weight is at most ``limit``; None when there is none."""
        index = int(np.searchsorted(self.weights, limit * (1 + _SLACK), side="right")) - 1
        return index if index >= 0 else None

    def within_cost(self, limit: float) -> int | None:
        """The point of least weight whose cost is at most ``limit``; None when there is none."""
        index = int(np.searchsorted(-self.costs, -limit * (1 + _SLACK), side="left"))
        return index if index < len(self.costs) else None


def pareto_front(
    items: Sequence[Sequence[tuple[float, float]]], limit: int = STATES, aim: tuple[float, float] | None = None
) -> Front:
    """The front over one ``(weight, cost)`` per item, all of them finite and not negative.

    Args:
        items: the options of each item; none is empty.
        limit: states kept after each item.
        aim: (multiplier, ceiling): leave out what cannot be part of a choice with
            ``cost + multiplier * weight <= ceiling``, so that the intervals of what is left are finer.
    """
    tables = [np.asarray(options, dtype=np.float64) for options in items]
    weights, costs = np.zeros(1), np.zeros(1)
    stages: list[_Stage] = []
    multiplier, ceiling = aim or (0.0, np.inf)
    rest = sum(float(np.min(table[:, 1] + multiplier * table[:, 0])) for table in tables)
    for table in tables:
        rest -= float(np.min(table[:, 1] + multiplier * table[:, 0]))
        heavier = (weights[:, None] + table[:, 0]).reshape(-1)
        dearer = (costs[:, None] + table[:, 1]).reshape(-1)
        kept = _undominated(heavier, dearer)
        kept = kept[dearer[kept] + multiplier * heavier[kept] + rest <= ceiling]
        kept = _thin(kept, heavier, limit)
        weights, costs = heavier[kept], dearer[kept]
        stages.append(np.divmod(kept, len(table)))
    greedy = _relaxed(tables)
    sums = _totals(tables, greedy)
    both = [np.concatenate((weights, sums[:, 0])), np.concatenate((costs, sums[:, 1]))]
    kept = _undominated(both[0], both[1])
    return Front(both[0][kept], both[1][kept], kept, len(weights), tuple(stages), greedy)


def _totals(tables: Sequence[NDArray[np.float64]], picks: NDArray[np.int64]) -> NDArray[np.float64]:
    """(weight, cost) ``[n, 2]`` of choices ``[n, items]``."""
    return np.sum([table[picks[:, item]] for item, table in enumerate(tables)], axis=0)


def least_cost(
    items: Sequence[Sequence[tuple[float, float]]], limit: float, states: int = STATES, front: Front | None = None
) -> list[int] | None:
    """The option of every item for the least total cost within a total weight of ``limit``; None when nothing fits.

    Args:
        items: one ``(weight, cost)`` per option; exchange them to find the least weight within a cost.
        limit: of the total weight.
        states: as in :func:`pareto_front`.
        front: of these items, when the caller has it.
    """
    multiplier = _multiplier(items, limit)
    best: tuple[float, list[int]] | None = None
    for _ in range(_ROUNDS):
        if front is None:
            # better choices have a Lagrangian below that of the best one found at the limit itself
            aim = (multiplier, (best[0] + multiplier * limit) * (1 + 1e-9)) if best else None
            front = pareto_front(items, states, aim)
        index = front.within_weight(limit)
        if index is None or (best is not None and front.costs[index] >= best[0]):
            break
        best = float(front.costs[index]), front.picks(index)
        front = None
    return best[1] if best else None


def _multiplier(items: Sequence[Sequence[tuple[float, float]]], limit: float) -> float:
    """Cost per weight at the limit: the multiplier with the best dual bound; 0 where the limit does not bind."""
    tables = [np.asarray(options, dtype=np.float64) for options in items]
    sums = _totals(tables, _relaxed(tables))
    step = int(np.searchsorted(sums[:, 0], limit, side="right"))
    if step in (0, len(sums)):
        return 0.0
    return float((sums[step - 1, 1] - sums[step, 1]) / (sums[step, 0] - sums[step - 1, 0]))


def _undominated(weights: NDArray[np.float64], costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the states that no other beats, by ascending weight (and so by strictly descending cost)."""
    order = np.lexsort((costs, weights))
    best = np.minimum.accumulate(costs[order])
    first = np.ones(len(order), dtype=bool)
    first[1:] = costs[order][1:] < best[:-1]
    return order[first]


def _thin(kept: NDArray[np.int64], weights: NDArray[np.float64], limit: int) -> NDArray[np.int64]:
    """The last (least costly) state of every interval of weight, and the lightest of all."""
    if len(kept) <= limit:
        return kept
    ordered = weights[kept]
    cells = np.floor((ordered - ordered[0]) * ((limit - 1) / (ordered[-1] - ordered[0])))
    last = np.ones(len(kept), dtype=bool)
    last[:-1] = cells[1:] != cells[:-1]
    last[0] = True
    return kept[last]


def _relaxed(tables: Sequence[NDArray[np.float64]]) -> NDArray[np.int64]:
    """The options of all items ``[n, items]``, from everything at its lightest, one step of one item at a time."""
    steps: list[tuple[float, int, int, int]] = []  # (-saving per weight, item, order within the item, next option)
    state = []
    for item, table in enumerate(tables):
        hull = _hull(table)
        state.append(hull[0])
        for order, (one, other) in enumerate(itertools.pairwise(hull)):
            slope = (table[other, 1] - table[one, 1]) / (table[other, 0] - table[one, 0])
            steps.append((float(slope), item, order, other))
    solutions = [list(state)]
    for _, item, _, option in sorted(steps):
        state[item] = option
        solutions.append(list(state))
    return np.asarray(solutions, dtype=np.int64).reshape(len(solutions), len(tables))


def _hull(table: NDArray[np.float64]) -> list[int]:
    """Options on the lower convex hull, by ascending weight: their savings per weight only fall."""
    hull: list[int] = []
    for option in _undominated(table[:, 0], table[:, 1]):
        weight, cost = table[option]
        while len(hull) > 1:
            (w1, c1), (w2, c2) = table[hull[-2]], table[hull[-1]]
            if (c2 - c1) * (weight - w1) < (cost - c1) * (w2 - w1):
                break
            hull.pop()
        hull.append(int(option))
    return hull
