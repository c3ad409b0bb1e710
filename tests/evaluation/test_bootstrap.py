"""Bootstrap intervals: their coverage, pairing and reproducibility."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hf_quant.errors import EvaluationError
from hf_quant.evaluation.bootstrap import Bootstrap, increase_percent, perplexity


@pytest.mark.parametrize(("shape", "least", "most"), [("normal", 0.90, 0.95), ("gamma", 0.86, 0.91)])
def test_covers_the_mean_about_as_often_as_the_readme_says(shape, least, most):
    """Intervals from 16 values undercover: 93 of 100 hold the mean of normal values, 88 of very skewed ones."""
    generator = np.random.default_rng(1)
    bootstrap = Bootstrap(16, 1000, 0)
    hits = 0
    for _ in range(1000):
        values = generator.normal(1.0, 0.3, 16) if shape == "normal" else generator.gamma(1.0, 1.0, 16)
        interval = bootstrap.interval(values)
        hits += interval.low <= 1.0 <= interval.high
    assert least <= hits / 1000 <= most


def test_the_ends_are_those_of_all_resamples():
    """Of few windows all resamples can be written down."""
    values = np.array([0.1, 0.25, 0.4, 0.9, 1.7])
    means = [values[list(picks)].mean() for picks in itertools.product(range(5), repeat=5)]
    found = Bootstrap(5, 20_000, 0).interval(values)
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=0.02)
    rows = np.random.default_rng(2).gamma(1.0, 1.0, (4, 50))
    ninths = [np.quantile(rows[list(picks)], 0.9) for picks in itertools.product(range(4), repeat=4)]
    (found,) = Bootstrap(4, 1000, 0).quantiles(rows, [0.9])
    assert [found.low, found.high] == pytest.approx(np.quantile(ninths, [0.025, 0.975]), rel=0.02)


def test_pairs_stay_pairs():
    """Windows differ a lot, both models alike: the increase is known far better than either perplexity."""
    generator = np.random.default_rng(1)
    reference = generator.normal(3.0, 0.5, 16)
    model = reference + generator.normal(0.05, 0.002, 16)
    bootstrap = Bootstrap(16, 2000, 0)
    increase = bootstrap.interval(reference, model, statistic=increase_percent)
    assert increase.value == pytest.approx(100 * np.expm1((model - reference).mean()))
    assert increase.high - increase.low < 0.5
    alone = bootstrap.interval(model, statistic=perplexity)
    assert (alone.high - alone.low) / alone.value > 0.2


def test_same_seed_same_interval_and_value_inside():
    values = np.array([0.0, 0.0, 0.0, 100.0])
    first, again = (Bootstrap(4, 500, 3).interval(values) for _ in range(2))
    assert first == again
    assert first.low <= first.value <= first.high


def test_needs_two_windows():
    with pytest.raises(EvaluationError, match="no confidence interval"):
        Bootstrap(1, 100, 0)
    with pytest.raises(EvaluationError, match="bootstrap_samples=0"):
        Bootstrap(4, 0, 0)
