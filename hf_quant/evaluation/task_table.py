"""Task results as rows of text, for the terminal and for the card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_quant.evaluation.task_results import MetricResult, TaskRun, headline, items_of, label_of

HEADER = ["task", "metric", "items", "float", "quantized", "recovery", "difference, paired", "lost / won", "p"]
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class TaskRow:
    """One line of a table of tasks, in words."""

    task: str
    metric: str
    items: int
    float_score: str
    quantized_score: str
    recovery: str
    difference: str
    flips: str
    p_value: str
    result: MetricResult

    @property
    def cells(self) -> list[str]:
        """In the order of :data:`HEADER`."""
        scores = [self.float_score, self.quantized_score, self.recovery, self.difference, self.flips, self.p_value]
        return [self.task, self.metric, f"{self.items:,}", *scores]


def task_rows(runs: Iterable[TaskRun]) -> list[TaskRow]:
    """Groups, and the tasks that are in none, of every run; shares are in percent, differences in points."""
    rows = []
    for run in runs:
        for item, found in headline(run):
            scale, unit = (100, " %") if _is_share(found) else (1, "")
            pair = found.paired
            flips = p_value = difference = "–"
            if pair is not None:
                difference = _with_error(pair.difference, pair.stderr, scale, sign=True)
                if pair.right_to_wrong is not None and pair.p_value is not None:
                    flips = f"{pair.right_to_wrong} / {pair.wrong_to_right}"
                    p_value = f"{pair.p_value:.2g}" if pair.p_value >= 0.001 else "< 0.001"
            rows.append(
                TaskRow(
                    task=item.name,
                    metric=label_of(item, found),
                    items=items_of(run, item),
                    float_score=_with_error(found.float_value, found.float_stderr, scale) + unit,
                    quantized_score=_with_error(found.quantized_value, found.quantized_stderr, scale) + unit,
                    recovery="–"
                    if found.recovery_percent is None
                    else _with_error(found.recovery_percent, found.recovery_stderr, 1) + " %",
                    difference=difference,
                    flips=flips,
                    p_value=p_value,
                    result=found,
                )
            )
    return rows


def verdict(rows: Sequence[TaskRow]) -> str:
    """How many of the exact tests say that the models differ, and how many would by chance alone; empty without any."""
    tested = [row.result.paired.p_value for row in rows if row.result.paired and row.result.paired.p_value is not None]
    if not tested:
        return ""
    below = sum(p < SIGNIFICANT for p in tested)
    by_chance = f"between two equal models at most {SIGNIFICANT * len(tested):.2g} would on average"
    have = f"{below or 'none'} {'has' if below < 2 else 'have'}"
    return f"Of {len(tested)} exact tests {have} p < {SIGNIFICANT}; {by_chance}."


def _is_share(found: MetricResult) -> bool:
    return found.higher_is_better and all(0 <= score <= 1 for score in (found.float_value, found.quantized_value))


def _with_error(value: float, error: float | None, scale: float, sign: bool = False) -> str:
    """``31.2 ± 2.9``: one decimal of percents and points, more of small figures."""
    size = abs(value if error is None or not error else error) * scale
    decimals = 1 if scale > 1 or size >= 1 else 3
    spec = f"{'+' if sign else ''},.{decimals}f"
    return f"{value * scale:{spec}}" + ("" if error is None else f" ± {error * scale:,.{decimals}f}")
