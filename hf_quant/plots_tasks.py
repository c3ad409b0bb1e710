"""The plot of tasks: how much of the float model's score the quantized model keeps, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence

from hf_quant.evaluation.task_table import TaskRow
from hf_quant.plot_frame import FAINT, INK, PALETTE, QUANTIZED, Plot, finished, new_figure, plain_label

NAME = "tasks"
_MOST = 40
_Z95 = 1.96


def draw_tasks(rows: Sequence[TaskRow]) -> Plot | None:
    """Recovery per task and metric; None where no task has one.

    Args:
        rows: of the table; those beyond the first 40 that have a recovery are not drawn, and the caption says so.

    Raises:
        DependencyError: matplotlib is missing.
    """
    known = [row for row in rows if row.result.recovery_percent is not None]
    shown = known[:_MOST]
    if not shown:
        return None
    figure, axes = new_figure(0.7 + 0.34 * len(shown))
    colors = dict(zip(dict.fromkeys(row.metric for row in shown), (QUANTIZED, *PALETTE[1:]) * _MOST, strict=False))
    reach: list[float] = [100.0]
    for i, row in enumerate(shown):
        value, error = row.result.recovery_percent or 0.0, row.result.recovery_stderr
        bar = _Z95 * (error or 0.0)
        reach += [value - bar, value + bar]
        axes.errorbar(
            value,
            i,
            xerr=None if error is None else bar,
            fmt="o",
            color=colors[row.metric],
            capsize=3.5,
            markersize=6,
            linewidth=1.6,
        )
        axes.annotate(
            f"{value:.1f} %",
            (value + bar, i),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK,
        )
    axes.axvline(100, color=INK, linewidth=1.2, linestyle="--", zorder=1)
    labels = [
        f"{plain_label(row.task, f'task {i + 1}')} · {plain_label(row.metric, '')}" for i, row in enumerate(shown)
    ]
    axes.set_yticks(range(len(shown)), labels, parse_math=False)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    low, high = min(reach), max(reach)
    room = max(high - low, 1.0)
    axes.set_xlim(low - 0.06 * room, high + 0.16 * room)
    axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:g} %")
    axes.set_xlabel("recovery: the float model's score is 100 %; bars are 95 % intervals", fontsize=9)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    ends = [row.result.recovery_percent or 0.0 for row in shown]
    spread = f"{min(ends):.1f} to {max(ends):.1f} %" if len(ends) > 1 else f"{ends[0]:.1f} %"
    left_out = f"; {len(known) - len(shown)} more are in the table" if len(known) > len(shown) else ""
    return finished(figure, NAME, f"Share of the float model's score that is kept: {spread}{left_out}")
