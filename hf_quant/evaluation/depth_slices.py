"""Where in a text the divergence lies: percentiles, by the float model's confidence, by the position in the window."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_quant.evaluation.bootstrap import Bootstrap, ratio
from hf_quant.evaluation.depth_results import Percentile, Slice, TextDepth
from hf_quant.evaluation.divergence import Divergence

# Edges of the float model's top-1 probability; the last slice holds 1 itself.
CONFIDENCE_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def text_depth(measured: Divergence, floor: Divergence | None, bootstrap: Bootstrap) -> TextDepth:
    """The slices of one text.

    Args:
        measured: the candidate against the reference, ``[windows, length - 1]``.
        floor: the noise floor on the same windows, or None.
        bootstrap: over these windows.
    """
    spots = np.broadcast_to(np.arange(1, measured.kl.shape[1] + 1), measured.kl.shape)
    inner = np.asarray(CONFIDENCE_EDGES[1:-1])
    return TextDepth(
        percentiles=_percentiles(measured, floor, bootstrap),
        by_confidence=_slices(
            np.digitize(measured.confidence, inner),
            [f"{low:g}–{high:g}" for low, high in pairwise(CONFIDENCE_EDGES)],
            measured,
            floor,
            bootstrap,
        ),
        by_position=_slices(np.log2(spots).astype(np.int64), _ranges(spots.shape[1]), measured, floor, bootstrap),
    )


def _ranges(last: int) -> list[str]:
    """``1``, ``2–3``, ``4–7``, ... up to ``last``."""
    names = []
    low = 1
    while low <= last:
        high = min(2 * low - 1, last)
        names.append(str(low) if low == high else f"{low}–{high}")
        low *= 2
    return names


def _percentiles(measured: Divergence, floor: Divergence | None, bootstrap: Bootstrap) -> tuple[Percentile, ...]:
    levels = list(QUANTILES.values())
    values = bootstrap.quantiles(measured.kl, levels)
    floors = bootstrap.quantiles(floor.kl, levels) if floor is not None else [None] * len(levels)
    return tuple(
        Percentile(name=name, kl=value, noise_floor_kl=below)
        for name, value, below in zip(QUANTILES, values, floors, strict=True)
    )


def _slices(
    index: NDArray[np.int64], names: list[str], measured: Divergence, floor: Divergence | None, bootstrap: Bootstrap
) -> tuple[Slice, ...]:
    """One slice per name that has positions; ``index [windows, n]`` says which slice a position belongs to."""
    found = []
    for i, name in enumerate(names):
        inside = (index == i).astype(np.float64)
        count = inside.sum(axis=1)
        if not count.any():
            continue

        def total(values: NDArray[Any], inside: NDArray[np.float64] = inside) -> NDArray[np.float64]:
            return np.asarray((values * inside).sum(axis=1))

        below = None if floor is None else bootstrap.interval(total(floor.kl), count, statistic=ratio)
        found.append(
            Slice(
                name=name,
                share=float(inside.mean()),
                kl=bootstrap.interval(total(measured.kl), count, statistic=ratio),
                top1_agreement=bootstrap.interval(total(measured.agree), count, statistic=ratio),
                noise_floor_kl=below,
            )
        )
    return tuple(found)
