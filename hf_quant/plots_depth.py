"""The plots of depth: KL by confidence and by position, and the error of every block and linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_quant.card_text import significant
from hf_quant.evaluation.depth_results import LayerDepth, LayerError, Slice
from hf_quant.evaluation.results import EvaluationResult
from hf_quant.plot_frame import FAINT, FLOAT, INK, PALETTE, Plot, add_legend, dress, finished, new_figure, plain_label

SLICES = "depth"
LAYERS = "layers"


def draw_depth(results: EvaluationResult) -> list[Plot]:
    """Every plot that the recorded depth allows. Raises DependencyError when matplotlib is missing."""
    plots = []
    if any(text.depth is not None for text in results.texts):
        plots.append(_slices(results))
    if results.depth is not None and results.depth.layers is not None and results.depth.layers.blocks:
        plots.append(_layers(results.depth.layers))
    return plots


def _slices(results: EvaluationResult) -> Plot:
    """KL by the float model's confidence (left) and by position (right): one line per text, its noise floor dashed."""
    figure, axes = new_figure(2.6)
    axes.remove()
    left, right = figure.subplots(1, 2, sharey=True)
    told = []
    for side, title in ((left, "float model's top-1 probability"), (right, "tokens read in the window")):
        dress(side, "y")
        side.set_xlabel(title, fontsize=9)
        parts: list[tuple[str, Sequence[Slice]]] = []
        for i, text in enumerate(results.texts):
            if (depth := text.depth) is not None:
                label = plain_label(text.name, f"text {i + 1}")
                parts.append((label, depth.by_confidence if side is left else depth.by_position))
        names = sorted({part.name for _, slices in parts for part in slices}, key=_start)
        for i, (name, found) in enumerate(parts):
            _line(side, names, found, PALETTE[i % len(PALETTE)], name)
        side.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
        told.append(f"{significant(min(_values(parts)), 2)} to {significant(max(_values(parts)), 2)}")
    if all(value > 0 for value in _values(parts)):
        left.set_yscale("log")
    left.set_ylabel("KL, nats per token", fontsize=9)
    handles, labels = left.get_legend_handles_labels()  # of the figure: beside one of the axes it would part them
    legend = figure.legend(
        handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=9, labelcolor=INK
    )
    for label in legend.get_texts():
        label.set_parse_math(False)
    return finished(
        figure,
        SLICES,
        f"KL by the float model's confidence ({told[0]} nats) and by position ({told[1]} nats), 95 % intervals",
    )


def _values(parts: Sequence[tuple[str, Sequence[Slice]]]) -> list[float]:
    return [part.kl.value for _, slices in parts for part in slices]


def _start(name: str) -> float:
    return float(name.split("–")[0])


def _line(axes: Any, names: Sequence[str], slices: Sequence[Slice], color: str, label: str) -> None:
    spots = [names.index(part.name) for part in slices]
    values = [part.kl.value for part in slices]
    bars = [[part.kl.value - part.kl.low for part in slices], [part.kl.high - part.kl.value for part in slices]]
    axes.errorbar(spots, values, yerr=bars, color=color, marker="o", markersize=4, capsize=2.5, label=label)
    below = [part.noise_floor_kl for part in slices]
    floors = [(spot, floor.value) for spot, floor in zip(spots, below, strict=True) if floor is not None]
    if floors and all(value > 0 for _, value in floors):
        axes.plot(*zip(*floors, strict=True), color=color, linewidth=1.2, linestyle=":", label=f"{label}, noise floor")


def _layers(layers: LayerDepth) -> Plot:
    """Bars: the error behind every block; dots: each linear layer's own error; dashes: the blocks' noise floor."""
    figure, axes = new_figure(2.7)
    blocks = layers.blocks
    values = [block.relative.value for block in blocks]
    bars = [[v - b.relative.low for v, b in zip(values, blocks, strict=True)]]
    bars.append([b.relative.high - v for v, b in zip(values, blocks, strict=True)])
    axes.bar(
        range(len(blocks)), values, yerr=bars, color=FLOAT, width=0.78, ecolor=INK, capsize=2, label="behind the block"
    )
    for i, (kind, members) in enumerate(_kinds(layers).items()):
        axes.plot(
            [_block(blocks, layer) for layer in members],
            [layer.relative.value for layer in members],
            linestyle="none",
            marker="osD^vPX"[i % 7],
            markersize=4.5,
            color=PALETTE[i % len(PALETTE)],
            label=plain_label(kind, f"layer {i + 1}"),
        )
    floors = [block.noise_floor.value for block in blocks if block.noise_floor is not None]
    if floors and len(floors) == len(blocks):
        axes.plot(range(len(blocks)), floors, color=INK, linewidth=1.2, linestyle="--", label="noise floor of blocks")
    step = max(1, -(-len(blocks) // 32))
    names = [block.name.rpartition(".")[2] for block in blocks]
    axes.set_xticks(range(0, len(blocks), step), names[::step])
    axes.set_xlim(-0.8, len(blocks) - 0.2)
    axes.set_xlabel("block; dots are single linear layers on the float model's inputs", fontsize=9)
    axes.set_ylabel("relative error", fontsize=9)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    add_legend(axes, 5)
    return finished(
        figure, LAYERS, f"Relative error behind every block: up to {100 * max(values):.3g} %, bars are 95 % intervals"
    )


def _kinds(layers: LayerDepth) -> dict[str, list[LayerError]]:
    """Linear layers by the last part of their name, those of the blocks that are drawn only."""
    kinds: dict[str, list[LayerError]] = {}
    for layer in layers.linears:
        if _block(layers.blocks, layer) is not None:
            kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    return kinds


def _block(blocks: Sequence[LayerError], layer: LayerError) -> int | None:
    return next((i for i, block in enumerate(blocks) if layer.name.startswith(f"{block.name}.")), None)
