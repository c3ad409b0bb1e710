"""The knapsack against brute force on small instances and against the linear relaxation's bound on large ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quant.quantize.knapsack import least_cost, pareto_front

_option = st.tuples(st.integers(1, 60).map(float), st.floats(0, 10, allow_nan=False))
_items = st.lists(st.lists(_option, min_size=1, max_size=5), min_size=1, max_size=6)


def _every(items):
    for picks in itertools.product(*(range(len(options)) for options in items)):
        chosen = [options[pick] for options, pick in zip(items, picks, strict=True)]
        yield sum(w for w, _ in chosen), sum(c for _, c in chosen)


@settings(max_examples=120, deadline=None)
@given(_items, st.floats(0.0, 1.0))
def test_within_a_weight_as_good_as_brute_force(items, share) -> None:
    everything = list(_every(items))
    low, high = min(w for w, _ in everything), max(w for w, _ in everything)
    limit = low + share * (high - low)
    front = pareto_front(items)
    index = front.within_weight(limit)
    assert index is not None
    assert front.weights[index] <= limit + 1e-6
    best = min(c for w, c in everything if w <= limit)
    assert front.costs[index] <= best * 1.01 + 1e-9
    picked = [options[pick] for options, pick in zip(items, front.picks(index), strict=True)]
    assert sum(w for w, _ in picked) == pytest.approx(front.weights[index])
    assert sum(c for _, c in picked) == pytest.approx(front.costs[index], abs=1e-12)
    assert front.within_weight(low - 0.5) is None
    exact = least_cost(items, limit)
    assert exact is not None
    picked = [options[pick] for options, pick in zip(items, exact, strict=True)]
    assert sum(w for w, _ in picked) <= limit + 1e-6
    assert sum(c for _, c in picked) <= best * (1 + 1e-9) + 1e-12
    assert least_cost(items, low - 0.5) is None


@settings(max_examples=120, deadline=None)
@given(_items, st.floats(0.0, 1.0))
def test_within_a_cost_as_light_as_brute_force(items, share) -> None:
    everything = list(_every(items))
    low, high = min(c for _, c in everything), max(c for _, c in everything)
    limit = low + share * (high - low)
    front = pareto_front(items)
    index = front.within_cost(limit + 1e-9)
    assert index is not None
    assert front.costs[index] <= limit + 1e-6
    assert front.weights[index] <= min(w for w, c in everything if c <= limit) * 1.01
    assert front.within_cost(low - 1e-3 - abs(low) * 1e-3) is None


def _relaxed(items, limit: float) -> float:
    """A lower bound of the least cost within ``limit``: the best Lagrangian dual value."""
    best = -np.inf
    for multiplier in np.geomspace(1e-9, 1e-3, 400):
        value = sum(min(c + multiplier * w for w, c in options) for options in items) - multiplier * limit
        best = max(best, value)
    return best


@pytest.mark.parametrize("states", [512, 2048])
def test_many_layers_are_near_the_relaxed_bound(states) -> None:
    """150 items as a model has them: costs fall fourfold per bit and differ by orders of magnitude between layers."""
    random = np.random.default_rng(0)
    items = []
    for _ in range(150):
        size, cost = random.choice([1.1e5, 3.3e5, 8.8e5, 2.6e6]), random.lognormal(0, 1.5)
        bits = np.array([4.03, 4.125, 4.25, 4.5, 8.03, 8.25, 16])
        items.append([(size * b, cost * 4 ** (4 - b) * random.uniform(0.9, 1.1) * (b < 16)) for b in bits])
    total = sum(options[0][0] / 4.03 for options in items)
    front = pareto_front(items, states)
    assert np.all(np.diff(front.weights) > 0)
    assert np.all(np.diff(front.costs) < 0)
    for target in (4.1, 4.25, 5.5):
        index = front.within_weight(target * total)
        assert index is not None
        bound = _relaxed(items, target * total)
        assert front.costs[index] <= 1.05 * bound
        picks = least_cost(items, target * total, states)
        assert sum(options[pick][0] for options, pick in zip(items, picks, strict=True)) <= target * total * (1 + 1e-9)
        found = sum(options[pick][1] for options, pick in zip(items, picks, strict=True))
        assert bound <= found * (1 + 1e-9) and found <= 1.002 * bound
