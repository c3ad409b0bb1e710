"""Bootstrap intervals: their coverage, pairing and reproducibility."""

from __future__ import annotations

import numpy as np
import pytest

from hf_quant.errors import EvaluationError
from hf_quant.evaluation.bootstrap import Bootstrap, increase_percent, perplexity


def test_covers_the_mean_about_as_often_as_promised():
    generator = np.random.default_rng(0)
    bootstrap = Bootstrap(16, 1000, 0)
    hits = 0
    for _ in range(300):
        interval = bootstrap.interval(generator.normal(3.0, 1.0, 16))
        hits += interval.low <= 3.0 <= interval.high
    # percentile intervals of 16 values undercover a little (about 92 % instead of 95 %)
    assert 0.88 <= hits / 300 <= 0.97


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
