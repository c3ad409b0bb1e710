"""What all plots of a card share: frame, colours and files; opaque, so that they read on light and on dark pages."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from hf_quant.card_text import one_line
from hf_quant.errors import DependencyError

PAGE = "#f6f7f9"
INK = "#24292f"
FAINT = "#d5d9de"
FLOAT = "#9aa3ad"
QUANTIZED = "#2f6fb3"
PALETTE = (QUANTIZED, "#d9822b", "#3c9a5f", "#b0457b", "#7a5bb5", "#8c6d31", "#4aa3b8")
DPI = 150
_LEGEND_CHARACTERS = 84  # that fit beside each other


@dataclass(frozen=True)
class Plot:
    """One plot: its name (``plots/NAME.png`` and ``.svg``), what it shows in words, and the figure of matplotlib."""

    name: str
    caption: str
    figure: Any = field(compare=False)

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Suffix -> bytes, without dates or random ids: the same figures give the same bytes."""
        import matplotlib

        files = {}
        with matplotlib.rc_context({"svg.hashsalt": "hf-quant", "svg.fonttype": "path"}):
            for suffix, options in (
                (".png", {"dpi": DPI, "metadata": {"Software": None}}),
                (".svg", {"metadata": {"Date": None}}),
            ):
                buffer = io.BytesIO()
                self.figure.savefig(buffer, format=suffix[1:], facecolor=PAGE, **options)
                files[suffix] = buffer.getvalue()
        return files


def new_figure(height: float) -> tuple[Any, Any]:
    """An opaque figure 7.2 inches wide that needs no display and leaves pyplot's global state alone."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError("the card's plots need matplotlib.", "pip install matplotlib.") from error
    figure = Figure(figsize=(7.2, height + 0.75), facecolor=PAGE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor(PAGE)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure, axes


def dress(axes: Any, grid: Literal["x", "y"]) -> None:
    """Dress one of several axes of a figure as :func:`new_figure` does a single one, with lines across ``grid``."""
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0, which="both")
    axes.grid(axis=grid, color=FAINT, linewidth=0.8)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def add_legend(axes: Any, columns: int) -> None:
    """A legend above the axes, to the left, in rows of at most ``columns`` (fewer where its texts are long)."""
    longest = max((len(label) for label in axes.get_legend_handles_labels()[1]), default=0)
    legend = axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=min(columns, max(1, _LEGEND_CHARACTERS // (longest + 4))),
        frameon=False,
        fontsize=9,
        borderaxespad=0.2,
        handlelength=1.2,
        columnspacing=1.6,
    )
    for text in legend.get_texts():
        text.set_color(INK)
        text.set_parse_math(False)


def byte_tick(value: float, _: object = None) -> str:
    """A round number of bytes for an axis: ``50 MB``."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B" if value else "0"


def plain_label(text: str, instead: str) -> str:
    """``text`` for an axis, or ``instead`` where the plot's font lacks one of its characters."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    plain = one_line(text)
    known = get_font(findfont(FontProperties())).get_charmap()
    if not plain or any(ord(character) not in known for character in plain):
        return instead
    return plain if len(plain) <= 40 else plain[:39] + "…"


def finished(figure: Any, name: str, caption: str) -> Plot:
    """The plot of a figure that is complete; its files are made when somebody asks for them."""
    return Plot(name, caption, figure)
