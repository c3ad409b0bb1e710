"""Confidence intervals: percentile bootstrap over windows, paired where two models saw the same windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hf_quant.errors import EvaluationError
from hf_quant.evaluation.results import Interval

Array = NDArray[np.float64]
LEVEL = 0.95
_ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_QUANTILE_SAMPLES = 1000  # each sorts all positions of all windows


class Bootstrap:
    """Resamples of the windows of one text; every figure of the text uses the same resamples, so pairs stay pairs.

    Windows, not tokens, are resampled: tokens of one window are not independent of one another.

    Args:
        windows: how many windows there are (at least 2, else EvaluationError).
        samples: how many resamples.
        seed: seed of the resampling.
    """

    def __init__(self, windows: int, samples: int, seed: int) -> None:
        if windows < 2:
            raise EvaluationError(f"{windows} window gives no confidence interval.", "use at least 2 windows.")
        if samples < 1:
            raise EvaluationError(f"bootstrap_samples={samples} is not positive.", "use 1,000 or more.")
        self.windows = windows
        self._picks = np.random.default_rng(seed).integers(windows, size=(samples, windows))

    def interval(self, *per_window: Array, statistic: Callable[..., Array] | None = None) -> Interval:
        """The 95 % interval of a statistic of means over windows.

        Args:
            per_window: one or more float64 ``[windows]`` arrays, resampled together.
            statistic: maps the mean of each array (arrays ``[n]``) to the figure ``[n]``; the mean itself by default.
        """
        function = statistic or _first
        value = function(*(np.asarray([array.mean()]) for array in per_window))[0]
        resampled = function(*(array[self._picks].mean(axis=1) for array in per_window))
        low, high = np.nanquantile(resampled, _ENDS)  # a resample without any position of a slice says nothing of it
        # A percentile interval need not contain the point estimate of a skewed statistic; a table that says otherwise
        # would confuse more than it would inform.
        return Interval(value=float(value), low=float(min(low, value)), high=float(max(high, value)))

    def quantiles(self, values: Array, levels: Sequence[float]) -> list[Interval]:
        """Quantiles over all entries of ``values [windows, n]``, with 95 % intervals of at most 1,000 resamples."""
        found = np.quantile(values, levels)
        picks = self._picks[:_QUANTILE_SAMPLES]
        resampled = np.asarray([np.quantile(values[pick], levels) for pick in picks])
        low, high = np.quantile(resampled, _ENDS, axis=0)
        return [
            Interval(value=float(value), low=float(min(a, value)), high=float(max(b, value)))
            for value, a, b in zip(found, low, high, strict=True)
        ]


def _first(values: Array) -> Array:
    return values


def perplexity(nll: Array) -> Array:
    """exp of the mean negative log-likelihood (nats per token)."""
    return np.exp(nll)


def ratio(total: Array, count: Array) -> Array:
    """total / count; NaN where nothing was counted."""
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def increase_percent(nll_float: Array, nll_quantized: Array) -> Array:
    """How much larger the quantized model's perplexity is, in percent of the float model's."""
    return np.expm1(nll_quantized - nll_float) * 100.0
