"""Plots of a comparison: loss against bytes and speed against bytes, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_quant.card_text import amount, significant
from hf_quant.comparison.result import Comparison
from hf_quant.plot_frame import (
    FAINT,
    FLOAT,
    INK,
    PALETTE,
    Plot,
    add_legend,
    byte_tick,
    finished,
    new_figure,
    plain_label,
)

_MARKERS = "osD^vPX"


def draw_comparison(comparison: Comparison) -> list[Plot]:
    """``loss-bytes``, and ``speed-bytes`` where speeds are known. Raises DependencyError without matplotlib."""
    plots = [_loss(comparison)]
    if any(speed is not None for speed in comparison.speeds()):
        plots.append(_speed(comparison))
    return plots


def _loss(comparison: Comparison) -> Plot:
    entries = comparison.entries
    figure, axes = new_figure(3.4)
    values = [entry.loss for entry in entries]
    on_front = comparison.accurate()
    _points(axes, comparison, values, on_front)
    floors = [entry.floor for entry in entries if entry.floor is not None]
    if floors:
        axes.axhline(floors[0], color=FLOAT, linewidth=1.2, linestyle="--", label="noise floor: float in 16 bits")
    if min([*values, *floors]) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.tick_params(axis="y", which="minor", length=0, labelleft=False)
        low, high = axes.get_ylim()
        axes.set_ylim(low / 1.3, high * 1.3)
    several = "; mean over " + ", ".join(loss.name for loss in entries[0].losses) if len(entries[0].losses) > 1 else ""
    axes.set_ylabel(plain_label(comparison.loss, "loss"), fontsize=9, parse_math=False)
    _finish(axes, comparison, several)
    best = [entry.name for entry, on in zip(entries, on_front, strict=True) if on]
    said = ", ".join(f"{e.name}: {significant(e.loss)} at {amount(e.disk_bytes)}" for e in entries)
    return finished(figure, "loss-bytes", f"{comparison.loss} against bytes: {said}; on the front: {', '.join(best)}")


def _speed(comparison: Comparison) -> Plot:
    figure, axes = new_figure(3.4)
    speeds = comparison.speeds()
    _points(axes, comparison, speeds, comparison.fast())
    unit = f"{comparison.speed_unit} per second"
    if comparison.one_run:
        label = f"{unit}, batch 1, all in one run"
    else:
        label = "speed, × the float model in the same run"
        axes.axhline(1, color=FLOAT, linewidth=1.2, linestyle="--", label="float model")
    axes.set_ylim(0, 1.15 * max(speed for speed in speeds if speed is not None))
    axes.set_ylabel(label, fontsize=9)
    _finish(axes, comparison, "")
    said = [f"{e.name}: {significant(s)}" for e, s in zip(comparison.entries, speeds, strict=True) if s is not None]
    return finished(figure, "speed-bytes", f"{label[0].upper()}{label[1:]} against bytes: {', '.join(said)}")


def _points(axes: Any, comparison: Comparison, values: Sequence[float | None], on_front: Sequence[bool]) -> None:
    """Every checkpoint with a marker of its own, filled on the front, and a line through the front."""
    places = [entry.disk_bytes for entry in comparison.entries]
    line = sorted((x, y) for x, y, on in zip(places, values, on_front, strict=True) if on and y is not None)
    if len(line) > 1:
        axes.plot(*zip(*line, strict=True), color=INK, alpha=0.45, linewidth=1.6, zorder=1, label="Pareto front")
    for i, (entry, value, on) in enumerate(zip(comparison.entries, values, on_front, strict=True)):
        if value is None:
            continue
        color = PALETTE[i % len(PALETTE)]
        axes.plot(
            [entry.disk_bytes],
            [value],
            _MARKERS[i % len(_MARKERS)],
            color=color,
            markerfacecolor=color if on else "none",
            markeredgewidth=1.8,
            markersize=8,
            linestyle="none",
            label=plain_label(entry.name, f"checkpoint {i + 1}") + ("" if on else " (beaten)"),
        )


def _finish(axes: Any, comparison: Comparison, more: str) -> None:
    axes.xaxis.set_major_formatter(byte_tick)
    axes.margins(x=0.12)
    axes.set_xlabel(f"files of weights (float: {amount(comparison.float_disk_bytes)}){more}", fontsize=9)
    axes.grid(color=FAINT, linewidth=0.8)
    add_legend(axes, 2)
