"""The card's plots, drawn from measured figures only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from hf_quant.card_text import LayerRow, amount, listing, one_line, significant
from hf_quant.evaluation.results import EvaluationResult, TextResult
from hf_quant.evaluation.task_table import task_rows
from hf_quant.plot_frame import (
    FAINT,
    FLOAT,
    INK,
    PALETTE,
    QUANTIZED,
    Plot,
    add_legend,
    byte_tick,
    finished,
    new_figure,
    plain_label,
)
from hf_quant.plots_depth import draw_depth
from hf_quant.plots_samples import draw_samples
from hf_quant.plots_tasks import draw_tasks
from hf_quant.quantize.allocate import Allocation

_KINDS = {"Linear": "linear layers", "Conv1D": "linear layers", "Embedding": "embeddings", "Norm": "norms and biases"}
_KINDS |= {f"Conv{dimensions}d": "convolutions" for dimensions in (1, 2, 3)}


def draw(results: EvaluationResult | None, rows: Sequence[LayerRow]) -> list[Plot]:
    """Every plot that the given measurements allow.

    Args:
        results: the evaluation; without it no plot of accuracy is drawn.
        rows: the plan's rows; those without bytes read from the checkpoint give no plot of bytes.

    Raises:
        DependencyError: matplotlib is missing.
    """
    plots = []
    if results is not None and results.texts:
        plots.append(_divergence(results.texts))
        plots += draw_depth(results)
    if results is not None and (samples := draw_samples(results.samples)) is not None:
        plots.append(samples)
    if rows and all(row.stored_bytes is not None for row in rows):
        plots.append(_bytes_by_kind(rows))
        if (blocks := _blocks(rows)) is not None:
            plots.append(_bytes_by_block(*blocks))
    if results is not None and (tasks := draw_tasks(task_rows(results.tasks))) is not None:
        plots.append(tasks)
    return plots


def draw_budget(
    allocation: Allocation, measured: Sequence[tuple[str, float, float]] = (), limit: tuple[str, float] | None = None
) -> Plot:
    """The Pareto curve that a budget chose from: predicted KL against bits per weight, and what was measured.

    Args:
        allocation: the chosen one, with its curve.
        measured: (name, bits per weight, measured KL in nats per token) of models that were quantized, named in the
            legend.
        limit: ("bits", bits per weight) or ("kl", nats per token): a line at the budget.

    Raises:
        DependencyError: matplotlib is missing.
    """
    figure, axes = new_figure(3.0)
    # the way from 8 bits to float is long and of little interest
    last = max(9.0, 1.3 * allocation.bits_per_weight, *(1.1 * bits for _, bits, _ in measured))
    curve = [p for p in allocation.curve if p.predicted_kl > 0 and p.bits_per_weight <= last]
    bits_of, loss_of = [p.bits_per_weight for p in curve], [p.predicted_kl for p in curve]
    axes.plot(bits_of, loss_of, color=FLOAT, linewidth=1.8, label="best predicted")
    if limit is not None:
        line = axes.axvline if limit[0] == "bits" else axes.axhline
        line(limit[1], color=PALETTE[1], linewidth=1.2, linestyle="--", label="budget")
    axes.plot(
        [allocation.bits_per_weight],
        [allocation.predicted_kl],
        "o",
        color=QUANTIZED,
        markersize=9,
        markerfacecolor="none",
        markeredgewidth=2,
        linestyle="none",
        label="chosen",
    )
    for i, (name, bits, kl) in enumerate(measured):
        color, marker = PALETTE[(i + 2) % len(PALETTE)], "DsvP^X"[i % 6]
        axes.plot(
            [bits],
            [kl],
            marker,
            color=color,
            markersize=6.5,
            linestyle="none",
            label=plain_label(name, f"model {i + 1}"),
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="y", which="minor", length=0, labelleft=False)
    axes.set_xlabel("bits per weight over the linear layers (codes, scales; float counts 16)", fontsize=9)
    axes.set_ylabel("KL(float ‖ quantized), nats per token", fontsize=9)
    axes.grid(color=FAINT, linewidth=0.8)
    add_legend(axes, 3)
    return finished(
        figure,
        "budget",
        f"Predicted KL against bits per weight: {significant(allocation.predicted_kl)} nats per token at "
        f"{allocation.bits_per_weight:.2f} bits was chosen",
    )


def _divergence(texts: Sequence[TextResult]) -> Plot:
    """KL of the quantized model and of the noise floor per text, with 95 % intervals."""
    figure, axes = new_figure(0.9 + 0.75 * len(texts))
    labels = [plain_label(text.name, f"text {i + 1}") for i, text in enumerate(texts)]
    figures = [text.kl for text in texts] + [t.noise_floor.kl for t in texts if t.noise_floor is not None]
    log = all(figure.value > 0 for figure in figures)
    smallest = min((figure.value for figure in figures), default=1.0)
    named: set[str] = set()
    for i, text in enumerate(texts):
        floor = text.noise_floor
        parts = [(text.kl, -0.14, QUANTIZED, "o", "quantized")]
        if floor is not None:
            parts.append((floor.kl, 0.14, FLOAT, "s", f"noise floor: float model in {floor.dtype}"))
        for interval, shift, color, marker, name in parts:
            low = max(interval.low, smallest / 10) if log else interval.low
            error = [[max(0.0, interval.value - low)], [max(0.0, interval.high - interval.value)]]
            axes.errorbar(
                interval.value,
                i + shift,
                xerr=error,
                fmt=marker,
                color=color,
                capsize=3.5,
                markersize=6,
                linewidth=1.6,
                label=None if name in named else name,
            )
            named.add(name)
            axes.annotate(
                significant(interval.value, 2),
                (max(interval.value, interval.high), i + shift),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=INK,
            )
    axes.set_yticks(range(len(texts)), labels, parse_math=False)
    axes.set_ylim(len(texts) - 0.5, -0.5)
    if log:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(low / 1.2, high * 2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.tick_params(axis="x", which="minor", length=0, labelbottom=False)
    else:
        axes.margins(x=0.15)
    axes.set_xlabel("KL(float ‖ quantized), nats per token; bars are 95 % intervals", fontsize=9)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    add_legend(axes, 2)
    said = listing([f"{significant(text.kl.value)} on {one_line(text.name)}" for text in texts])
    return finished(figure, "kl", f"KL divergence from the float model in nats per token: {said}")


def _bytes_by_kind(rows: Sequence[LayerRow]) -> Plot:
    """Bytes of the float model and of the checkpoint, by kind of weight."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        kind = "norms and biases" if row.kind == "Bias" else _KINDS.get(row.kind, one_line(row.kind))
        if kind == "linear layers" and not row.is_quantized:
            kind = "linear layers left in float"
        elif kind == "linear layers":
            kind = "linear layers, quantized"
        totals[kind][0] += row.float_bytes
        totals[kind][1] += row.stored_bytes or 0
    totals = {kind: pair for kind, pair in totals.items() if sum(pair)}
    kinds = sorted(totals, key=lambda kind: -totals[kind][0])
    figure, axes = new_figure(1.0 + 0.62 * len(kinds))
    largest = max(max(pair) for pair in totals.values())
    for i, kind in enumerate(kinds):
        for shift, value, color in ((-0.2, totals[kind][0], FLOAT), (0.2, totals[kind][1], QUANTIZED)):
            axes.barh(i + shift, value, height=0.36, color=color)
            axes.annotate(
                amount(value),
                (value, i + shift),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=INK,
            )
    axes.set_yticks(
        range(len(kinds)), [plain_label(kind, f"kind {i + 1}") for i, kind in enumerate(kinds)], parse_math=False
    )
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_xlim(0, largest * 1.18)
    axes.xaxis.set_major_formatter(byte_tick)
    axes.set_xlabel("bytes", fontsize=9)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    before, after = sum(pair[0] for pair in totals.values()), sum(pair[1] for pair in totals.values())
    for color, name in ((FLOAT, f"float model: {amount(before)}"), (QUANTIZED, f"this checkpoint: {amount(after)}")):
        axes.barh(0, 0, color=color, label=name)
    add_legend(axes, 2)
    return finished(
        figure, "bytes", f"Bytes of weights by kind: {amount(before)} in float, {amount(after)} stored here"
    )


def _blocks(rows: Sequence[LayerRow]) -> tuple[list[str], list[dict[str, int]], list[int], list[str]] | None:
    """(names, stored bytes per label, float bytes, prefixes) of the numbered blocks; None without any."""
    found: dict[tuple[str, int], dict[str, int]] = {}
    before: dict[tuple[str, int], int] = defaultdict(int)
    for row in rows:
        parts = row.name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            continue
        key = (".".join(parts[:at]), int(parts[at]))
        found.setdefault(key, defaultdict(int))[row.label if row.is_quantized else "float"] += row.stored_bytes or 0
        before[key] += row.float_bytes
    if len(found) < 2:
        return None
    prefixes = list(dict.fromkeys(prefix for prefix, _ in found))
    ordered = sorted(found, key=lambda key: (prefixes.index(key[0]), key[1]))
    return [str(n) for _, n in ordered], [found[key] for key in ordered], [before[key] for key in ordered], prefixes


def _bytes_by_block(names: list[str], blocks: list[dict[str, int]], before: list[int], prefixes: list[str]) -> Plot:
    """Stored bytes of every block, stacked by how the weights are stored, before the bytes of the float model."""
    figure, axes = new_figure(2.7)
    axes.bar(range(len(blocks)), before, color=FAINT, width=0.78, label="float model")
    labels = sorted({label for block in blocks for label in block}, key=lambda label: (label == "float", label))
    base = [0.0] * len(blocks)
    for i, label in enumerate(labels):
        heights = [float(block.get(label, 0)) for block in blocks]
        color = FLOAT if label == "float" else PALETTE[i % len(PALETTE)]
        name = "here, left in float" if label == "float" else f"here, {label}"
        axes.bar(range(len(blocks)), heights, bottom=base, color=color, width=0.78, label=name)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    step = max(1, -(-len(names) // 32))
    axes.set_xticks(range(0, len(names), step), names[::step])
    axes.set_xlim(-0.8, len(names) - 0.2)
    axes.set_ylim(0, max(*base, *before) * 1.05 or 1)
    axes.yaxis.set_major_formatter(byte_tick)
    axes.set_xlabel(f"block of {_listed(prefixes)}", fontsize=9, parse_math=False)
    for start in [i for i in range(1, len(names)) if int(names[i]) <= int(names[i - 1])]:  # the next list of blocks
        axes.axvline(start - 0.5, color=FLOAT, linewidth=1.2, linestyle=":")
    axes.set_ylabel("bytes", fontsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    add_legend(axes, 3)
    spread = list(dict.fromkeys((amount(min(base)), amount(max(base)))))
    of = " to ".join(dict.fromkeys((amount(min(before)), amount(max(before)))))
    return finished(figure, "blocks", f"Bytes stored per block: {' to '.join(spread)}, of {of} in float")


def _listed(prefixes: Sequence[str]) -> str:
    """The lists of blocks from left to right, without the names that all of them are in."""
    parts = [prefix.split(".") for prefix in prefixes]
    shared = 0
    while len(parts) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    said = [plain_label(".".join(part[shared:]), f"list {i + 1}") for i, part in enumerate(parts)]
    return (" | " if sum(map(len, said)) <= 80 else " |\n").join(said)
