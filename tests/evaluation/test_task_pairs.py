"""Two models on the same items: figures against formulas worked out by hand and against resampling."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from hf_quant.errors import EvaluationError
from hf_quant.evaluation.task_pairs import combine, compare_items, exact_p, recovery


def mean(values):
    return sum(values) / len(values)


def compare(pairs, aggregate=mean, higher_is_better=True, metric="acc"):
    return compare_items("task", metric, "none", higher_is_better, pairs, aggregate, 0)


def test_flips_difference_and_errors():
    pairs = [(1, 1)] * 5 + [(1, 0)] * 3 + [(0, 1)] * 1 + [(0, 0)] * 3
    found = compare(pairs)
    assert found.float_value == pytest.approx(8 / 12) and found.quantized_value == pytest.approx(6 / 12)
    assert found.float_stderr == pytest.approx(statistics.stdev(p[0] for p in pairs) / math.sqrt(12))
    assert found.recovery_percent == pytest.approx(75)
    pair = found.paired
    assert (pair.items, pair.right_to_wrong, pair.wrong_to_right) == (12, 3, 1)
    assert pair.difference == pytest.approx(-2 / 12)
    assert pair.stderr == pytest.approx(statistics.stdev(q - f for f, q in pairs) / math.sqrt(12))
    assert pair.stderr < math.hypot(found.float_stderr, found.quantized_stderr)
    assert pair.p_value == pytest.approx(2 * (1 + 4) / 16)


def test_exact_p_is_the_sum_over_all_coin_throws():
    for lost, won in ((0, 0), (1, 0), (5, 0), (3, 3), (2, 7), (9, 4)):
        flips = lost + won
        throws = itertools.product((0, 1), repeat=flips)
        as_uneven = sum(abs(sum(t) - flips / 2) >= abs(lost - flips / 2) for t in throws)
        assert exact_p(lost, won) == pytest.approx(min(1, as_uneven / 2**flips))
    assert 0 < exact_p(900, 1100) < 1e-5


def test_the_recovery_error_is_that_of_resampled_items():
    generator = np.random.default_rng(1)
    floats = (generator.random(400) < 0.6).astype(int)
    flipped = generator.random(400) < 0.1
    pairs = list(zip(floats.tolist(), np.where(flipped, 1 - floats, floats).tolist(), strict=True))
    array = np.array(pairs)
    drawn = [array[generator.integers(400, size=400)].mean(axis=0) for _ in range(4000)]
    spread = np.std([100 * q / f for f, q in drawn])
    assert compare(pairs).recovery_stderr == pytest.approx(spread, rel=0.05)


def test_other_metrics_are_resampled_in_pairs_and_lower_can_be_better():
    generator = np.random.default_rng(2)
    logs = generator.normal(-2, 1, 300)
    pairs = [(float(a), float(a) - 0.1) for a in logs]

    def perplexity(values):
        return math.exp(-mean(values))

    found = compare(pairs, perplexity, higher_is_better=False, metric="perplexity")
    assert found.recovery_percent == pytest.approx(100 * math.exp(-0.1))
    assert found.recovery_stderr == pytest.approx(0, abs=1e-9)  # every resample has the same ratio
    assert found.float_stderr == pytest.approx(found.float_value / math.sqrt(300), rel=0.15)
    assert found.paired.right_to_wrong is None and found.paired.p_value is None
    assert 0 < found.paired.stderr < found.float_stderr
    assert recovery(0.0, 0.3, True) is None and recovery(2.0, 4.0, False) == 50


def test_tuples_need_no_numbers_and_infinite_scores_are_refused():
    def weighted(values):
        return math.exp(-sum(v[0] for v in values) / sum(v[1] for v in values))

    pairs = [((-3.0 - i, 2), (-3.3 - i, 2)) for i in range(6)]
    assert compare(pairs, weighted, False, "word_perplexity").paired.items == 6
    with pytest.raises(EvaluationError, match="perplexity of the quantized model on the task 'task' is inf"):
        compare([(1.0, 1.0), (1.0, math.inf)], mean, False, "perplexity")


def test_one_item_has_no_error():
    found = compare([(1, 0)])
    assert found.float_stderr is None and found.paired.stderr is None and found.recovery_percent == 0


def test_groups_weigh_their_tasks_and_add_their_flips():
    small = compare([(1, 0), (0, 0), (1, 1), (1, 1)])
    large = compare([(1, 1)] * 6 + [(0, 1)] * 2 + [(1, 0)] * 4)
    group = combine([small, large], [4, 12])
    assert group.float_value == pytest.approx((3 + 10) / 16) and group.quantized_value == pytest.approx((2 + 8) / 16)
    assert (group.paired.items, group.paired.right_to_wrong, group.paired.wrong_to_right) == (16, 5, 2)
    assert group.paired.difference == pytest.approx(-3 / 16)
    errors = (small.paired.stderr * 4 / 16, large.paired.stderr * 12 / 16)
    assert group.paired.stderr == pytest.approx(math.hypot(*errors))
    assert group.paired.p_value == exact_p(5, 2)
    even = combine([small, large], [1, 1])
    assert even.float_value == pytest.approx((3 / 4 + 10 / 12) / 2)
