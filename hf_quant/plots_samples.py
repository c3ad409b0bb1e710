"""The plot of models that continue no text: every figure in a panel of its own, beside its noise floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_quant.card_text import listing, one_line, value_only
from hf_quant.evaluation.results import Figure, Interval, SampleResult
from hf_quant.plot_frame import FLOAT, INK, PALETTE, QUANTIZED, Plot, dress, finished, new_figure, plain_label

NAME = "samples"
_ACROSS = 2  # panels side by side
_MOST_SETS = 8  # sets of samples; more are in the table
# unit -> (what a number is multiplied by, what stands behind it, what the axis says)
_UNITS = {"share": (100.0, " %", ""), "percent": (1.0, " %", ""), "nats": (1.0, "", ", nats"), "number": (1.0, "", "")}
_SMALL_IS_GOOD = ("kl", "embedding_distance", "text_distance", "state_error")

_AT_MOST = {"top1_agreement": 100, "neighbour_agreement": 100, "same_answer": 100, "rank_correlation": 1}


@dataclass(frozen=True)
class _Mark:
    """One value in a panel: where it stands within its row, and how it looks."""

    label: str
    color: str
    shape: str


_QUANTIZED = _Mark("quantized", QUANTIZED, "o")
_ROUNDED = _Mark("quantized, int8 activations", PALETTE[1], "D")


def draw_samples(samples: Sequence[SampleResult]) -> Plot | None:
    """Figures with 95 % intervals, one panel each, one row per set of samples; None where nothing was measured.

    Sets beyond the first 8 are not drawn, and the caption says so.

    Raises:
        DependencyError: matplotlib is missing.
    """
    shown = list(samples[:_MOST_SETS])
    panels: dict[tuple[str, str], list[SampleResult]] = {}
    for found in shown:
        for figure in found.figures:
            panels.setdefault((figure.name, figure.title), []).append(found)
    if not panels:
        return None
    down = -(-len(panels) // _ACROSS)
    figure, axes = new_figure(down * (0.85 + 0.42 * len(shown)) + 0.1)
    axes.remove()
    across = min(_ACROSS, len(panels))
    grid = figure.subplots(down, across, squeeze=False)
    marks: dict[str, Any] = {}
    left: Sequence[SampleResult] = ()
    for i, (place, ((name, title), members)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
        marks |= _panel(place, name, title, members)
        if i % across and left == members:  # the panel beside it names the same rows
            place.set_yticks(place.get_yticks(), [""] * len(members))
        left = members
    for place in list(grid.flat)[len(panels) :]:
        place.remove()
    legend = figure.legend(
        marks.values(),
        marks.keys(),
        loc="outside upper left",
        ncols=3,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    said = [f"{_told(found.figures[0])} on {one_line(found.name)}" for found in shown]
    headed = one_line(shown[0].figures[0].title)
    left_out = f"; {len(samples) - len(shown)} more sets are in the table" if len(samples) > len(shown) else ""
    return finished(
        figure, NAME, f"{headed[:1].upper()}{headed[1:]}: {listing(said)}{left_out}; bars are 95 % intervals"
    )


def _panel(axes: Any, name: str, title: str, members: Sequence[SampleResult]) -> dict[str, Any]:
    """Draw one figure of every set of samples; returns what the legend names."""
    dress(axes, "x")
    figures = [found.figure(name) for found in members]
    unit = figures[0].unit if figures[0] is not None else "number"
    factor, _, axis = _UNITS[unit]
    handles: dict[str, Any] = {}
    reach: list[float] = []
    for row, (found, figure) in enumerate(zip(members, figures, strict=True)):
        assert figure is not None
        floor = _Mark(f"noise floor: float in {found.noise_floor_dtype}", FLOAT, "s")
        parts = [(_QUANTIZED, figure.value), (_ROUNDED, figure.int8_activations), (floor, figure.noise_floor)]
        given = [(mark, value) for mark, value in parts if value is not None]
        for place, (mark, value) in enumerate(given):
            height = row + 0.26 * (place - (len(given) - 1) / 2)
            handles[mark.label] = _draw(axes, height, mark, value, factor, unit)
            reach += [factor * value.low, factor * value.value, factor * value.high]
    labels = [plain_label(found.name, f"samples {i + 1}") for i, found in enumerate(members)]
    axes.set_yticks(range(len(members)), labels, parse_math=False)
    axes.set_ylim(len(members) - 0.4, -0.6)
    axes.set_title(
        plain_label(title[:1].upper() + title[1:], name) + axis, fontsize=9, loc="left", color=INK, parse_math=False
    )
    _scale(axes, reach, name, _UNITS[unit][1])
    return handles


def _draw(axes: Any, height: float, mark: _Mark, value: Interval, factor: float, unit: str) -> Any:
    middle, low, high = factor * value.value, factor * value.low, factor * value.high
    drawn = axes.errorbar(
        middle,
        height,
        xerr=[[max(0.0, middle - low)], [max(0.0, high - middle)]],
        fmt=mark.shape,
        color=mark.color,
        capsize=3,
        markersize=5.5,
        linewidth=1.5,
    )
    axes.annotate(
        _number(value, factor, unit),
        (max(middle, high), height),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=INK,
    )
    return drawn


def _scale(axes: Any, reach: Sequence[float], name: str, unit: str) -> None:
    """Losses that differ by factors on a logarithmic axis; everything else from zero, or on the part that is used."""
    low, high = min(reach), max(reach)
    if name in _SMALL_IS_GOOD and low > 0 and high > 20 * low:
        axes.set_xscale("log")
        room = (high / low) ** 0.05
        axes.set_xlim(low / room, high * (high / low) ** 0.4)
        axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
        axes.tick_params(axis="x", which="minor", length=0, labelbottom=False)
        return
    if name in _SMALL_IS_GOOD:
        low = min(low, 0.0)
    spread = max(high - low, 0.1 * abs(high), 1e-12)  # equal values stand at the right of an axis of some width
    axes.set_xlim(high - 1.05 * spread, high + 0.35 * spread)
    axes.locator_params(axis="x", nbins=5)
    if name in _AT_MOST:
        axes.set_xticks([tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= _AT_MOST[name]])
    axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}{unit}")


def _number(value: Interval, factor: float, unit: str) -> str:
    """As in the card's table: as many digits as the interval allows."""
    scaled = Interval(value=factor * value.value, low=factor * value.low, high=factor * value.high)
    return f"{value_only(scaled, sign=unit == 'percent')}{_UNITS[unit][1]}"


def _told(figure: Figure) -> str:
    return f"{_number(figure.value, _UNITS[figure.unit][0], figure.unit)}{' nats' if figure.unit == 'nats' else ''}"
