"""Two models on the same items: scores, standard errors, the paired difference, flips and an exact test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hf_quant.errors import EvaluationError
from hf_quant.evaluation.task_results import MetricResult, Paired

Aggregate = Callable[[list[Any]], float]
_RESAMPLES = 1000
_FEW_RESAMPLES = 100
_SLOW = ("bleu", "chrf", "chrf++", "ter")  # metrics of a whole corpus
_MEAN_TOLERANCE = 1e-9


def compare_items(
    name: str,
    metric: str,
    filter_name: str,
    higher_is_better: bool,
    pairs: Sequence[tuple[Any, Any]],
    aggregate: Aggregate,
    seed: int,
) -> MetricResult:
    """A metric of both models from its values per item.

    Means over items get closed standard errors, of the recovery by the delta method on the pairs: with R the ratio,
    the standard error of mean(q_i - R f_i) / mean(f). Other metrics (perplexity, F1 of a corpus) get a bootstrap over
    items, the same resamples for both models.

    Args:
        name: of the task, for errors.
        metric: its name.
        filter_name: how answers were read.
        higher_is_better: of the metric.
        pairs: (float, quantized) per item.
        aggregate: the metric over a list of values of one model.
        seed: of the bootstrap.

    Raises:
        EvaluationError: a score is not a finite number.
    """
    floats, quantized = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    scores = _finite(name, metric, "float", aggregate(floats)), _finite(name, metric, "quantized", aggregate(quantized))
    known: dict[str, Any] = {
        "metric": metric,
        "filter": filter_name,
        "higher_is_better": higher_is_better,
        "float_value": scores[0],
        "quantized_value": scores[1],
        "recovery_percent": recovery(*scores, higher_is_better),
    }
    arrays = _numbers(floats), _numbers(quantized)
    if arrays[0] is None or arrays[1] is None or not _are_means(arrays, scores):
        count = _FEW_RESAMPLES if metric in _SLOW else _RESAMPLES
        drawn = _bootstrap(floats, quantized, aggregate, count, seed) if len(pairs) > 1 else None
        return MetricResult(**known, **_bootstrapped(drawn, len(pairs), scores, higher_is_better))
    return MetricResult(**known, **_of_means(arrays[0], arrays[1], scores, higher_is_better))


def combine(metrics: Sequence[MetricResult], weights: Sequence[float]) -> MetricResult:
    """The weighted mean of one metric over independent tasks; flips add up, and are tested together."""
    share = np.asarray(weights, dtype=float) / sum(weights)
    first = metrics[0]
    scores = tuple(float(share @ [getattr(m, key) for m in metrics]) for key in ("float_value", "quantized_value"))
    paired = None
    parts = [metric.paired for metric in metrics]
    error = None
    if all(part is not None for part in parts):
        known = [part for part in parts if part is not None]
        lost, won = _total([p.right_to_wrong for p in known]), _total([p.wrong_to_right for p in known])
        error = _root([part.stderr for part in known], share)
        paired = Paired(
            items=sum(part.items for part in known),
            difference=scores[1] - scores[0],
            stderr=error,
            right_to_wrong=lost,
            wrong_to_right=won,
            p_value=None if lost is None or won is None else exact_p(lost, won),
        )
    # to first order, with the float scores as given: a share of them
    own = _root([m.recovery_stderr and m.recovery_stderr * m.float_value for m in metrics], share)
    return MetricResult(
        metric=first.metric,
        filter=first.filter,
        higher_is_better=first.higher_is_better,
        float_value=scores[0],
        float_stderr=_root([metric.float_stderr for metric in metrics], share),
        quantized_value=scores[1],
        quantized_stderr=_root([metric.quantized_stderr for metric in metrics], share),
        recovery_percent=recovery(scores[0], scores[1], first.higher_is_better),
        recovery_stderr=None if own is None or not scores[0] or not first.higher_is_better else own / scores[0],
        paired=paired,
    )


def recovery(float_value: float, quantized_value: float, higher_is_better: bool) -> float | None:
    """Percent: quantized / float, or float / quantized where lower is better; None where that divides by zero."""
    above, below = (quantized_value, float_value) if higher_is_better else (float_value, quantized_value)
    return 100 * above / below if below else None


def exact_p(lost: int, won: int) -> float:
    """Two-sided binomial test of ``lost`` against ``won`` at one half (McNemar's exact test); 1 without any flip."""
    flips = lost + won
    few = min(lost, won)
    tail = sum(math.exp(_log_choose(flips, k) - flips * math.log(2)) for k in range(few + 1))
    return min(1.0, 2 * tail)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _of_means(f: np.ndarray, q: np.ndarray, scores: tuple[float, float], higher_is_better: bool) -> dict[str, Any]:
    lost = won = p_value = None
    if set(np.unique(f)) | set(np.unique(q)) <= {0.0, 1.0}:
        better, worse = (f, q) if higher_is_better else (q, f)
        lost, won = int((better > worse).sum()), int((better < worse).sum())
        p_value = exact_p(lost, won)
    above, below = (q, f) if higher_is_better else (f, q)
    ratio = above.mean() / below.mean() if below.mean() else None
    slope = None if ratio is None else _mean_stderr(above - ratio * below)
    return {
        "float_stderr": _mean_stderr(f),
        "quantized_stderr": _mean_stderr(q),
        "recovery_stderr": None if slope is None else 100 * slope / abs(float(below.mean())),
        "paired": Paired(
            items=len(f),
            difference=scores[1] - scores[0],
            stderr=_mean_stderr(q - f),
            right_to_wrong=lost,
            wrong_to_right=won,
            p_value=p_value,
        ),
    }


def _bootstrapped(
    drawn: np.ndarray | None, items: int, scores: tuple[float, float], higher_is_better: bool
) -> dict[str, Any]:
    spread: tuple[float | None, ...] = (None, None, None)
    ratio = None
    if drawn is not None and np.isfinite(drawn).all():
        spread = tuple(float(row.std(ddof=1)) for row in (*drawn, drawn[1] - drawn[0]))
        above, below = (drawn[1], drawn[0]) if higher_is_better else (drawn[0], drawn[1])
        ratio = None if (below == 0).any() else float(100 * (above / below).std(ddof=1))
    return {
        "float_stderr": spread[0],
        "quantized_stderr": spread[1],
        "recovery_stderr": ratio,
        "paired": Paired(items=items, difference=scores[1] - scores[0], stderr=spread[2]),
    }


def _bootstrap(floats: list[Any], quantized: list[Any], aggregate: Aggregate, count: int, seed: int) -> np.ndarray:
    """float64 ``[2, count]``: both models' scores on the same resamples of the items."""
    generator = np.random.default_rng(seed)
    found = np.empty((2, count))
    for i in range(count):
        picks = generator.integers(len(floats), size=len(floats))
        for row, values in enumerate((floats, quantized)):
            found[row, i] = aggregate([values[pick] for pick in picks])
    return found


def _numbers(values: Sequence[Any]) -> np.ndarray | None:
    """float64 ``[items]``; None when the values are no plain numbers."""
    if not all(isinstance(value, (bool, int, float, np.number, np.bool_)) for value in values):
        return None
    return np.asarray(values, dtype=np.float64)


def _are_means(arrays: Sequence[np.ndarray | None], scores: Sequence[float]) -> bool:
    return all(
        array is not None and abs(float(array.mean()) - score) <= _MEAN_TOLERANCE * max(1.0, abs(score))
        for array, score in zip(arrays, scores, strict=True)
    )


def _mean_stderr(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _root(errors: Sequence[float | None], share: np.ndarray) -> float | None:
    """The standard error of a weighted sum of independent figures; None when one of theirs is not known."""
    known = [error for error in errors if error is not None]
    return float(np.sqrt(((share * known) ** 2).sum())) if len(known) == len(errors) else None


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _finite(name: str, metric: str, model: str, score: Any) -> float:
    value = float(score)
    if not math.isfinite(value):
        raise EvaluationError(
            f"{metric} of the {model} model on the task {name!r} is {value}.",
            "the model is broken, or the task does not suit it: leave the task out.",
        )
    return value
