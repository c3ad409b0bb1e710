"""The figures of scripts/bench_generate.py as Markdown tables and as bars."""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from typing import Any

from hf_quant.checkpoint import atomic_write
from hf_quant.evaluation.table import amount, markdown_table
from hf_quant.plot_frame import DPI, FAINT, FLOAT, INK, PAGE, QUANTIZED

OURS = "hf-quant"
# The rivals that our rows are held against, per measurement: (what the column is called, the runtime, its layouts).
RIVALS = (
    ("decode", "transformers bf16", "transformers", "bf16"),
    ("decode", "llama.cpp Q4_0", "llama.cpp", "Q4_0"),
    ("prefill", "transformers bf16", "transformers", "bf16"),
    ("prefill", "OpenVINO int4", "OpenVINO GenAI", "int4"),
    ("prefill", "OpenVINO int8", "OpenVINO GenAI", "int8"),
)
Row = dict[str, Any]


def tables(data: dict[str, Any]) -> list[str]:
    """Markdown: every row with its speeds, our rows against their rivals, loading, and what a reader has to know."""
    lines = speeds(data)
    held = against(data)
    if held:
        lines += ["", *held]
    if data["first_token"]:
        lines += ["", *loading(data["first_token"])]
    return [*lines, "", note(data)]


def measured(data: dict[str, Any]) -> list[str]:
    """The measurements that any row has, decoding first, each by growing size."""
    names = {task for row in data["rows"].values() for task in row["samples"]}
    return sorted(names, key=lambda name: (name.partition(" ")[0], int(name.partition(" ")[2])))


def title(task: str) -> str:
    """What a column calls a measurement."""
    kind, _, size = task.partition(" ")
    if kind == "prefill":
        return f"prefill {size}, tok/s"
    return "decode, tok/s" if size == "1" else f"{size} sequences, total tok/s"


def values(row: Row, task: str) -> list[float]:
    """Tokens per second of every round."""
    return [sample["tokens_per_second"] for sample in row["samples"].get(task, [])]


def speeds(data: dict[str, Any]) -> list[str]:
    """One line per contender."""
    names = measured(data)
    bandwidth = statistics.median(data["bandwidth"]) if data["bandwidth"] else None
    header = ["runtime", "version", "weights", "read per token", *map(title, names), "decode GB/s (of bandwidth)"]
    body = []
    for row in data["rows"].values():
        cells = [spread(values(row, task)) for task in names]
        rate = rate_of(row, bandwidth)
        if "failed" in row:
            reason = "failed: " + row["failed"].replace("\n", " ")
            cells, rate = [reason if i == 0 else "" for i in range(len(names))], "" if names else reason
        size = amount(row["token_bytes"]) if "token_bytes" in row else ""
        name = f"**{row['name']}**" if row["name"] == OURS else row["name"]
        body.append([name, row.get("version", ""), row["layout"], size, *cells, rate])
    return markdown_table(header, body)


def spread(figures: list[float]) -> str:
    """Median (lowest – highest)."""
    if not figures:
        return ""
    digits = 0 if statistics.median(figures) >= 100 else 1
    middle, low, high = (f"{v:,.{digits}f}" for v in (statistics.median(figures), min(figures), max(figures)))
    return f"{middle} ({low} – {high})"


def rate_of(row: Row, bandwidth: float | None) -> str:
    """Bytes of weights read per second while one sequence is decoded, and their share of the read bandwidth."""
    decoded = values(row, "decode 1")
    if not decoded or "token_bytes" not in row:
        return ""
    rate = statistics.median(decoded) * row["token_bytes"] / 1e9
    return f"{rate:.1f}" + (f" ({rate / bandwidth:.0%})" if bandwidth else "")


def against(data: dict[str, Any]) -> list[str]:
    """Our rows in multiples of their rivals; empty when nothing can be compared."""
    names = measured(data)
    columns = []
    for task in names:
        for kind, label, name, layout in RIVALS:
            rival = next((r for r in data["rows"].values() if r["name"] == name and matches(r["layout"], layout)), None)
            if task.startswith(kind) and rival and values(rival, task):
                columns.append((f"{title(task).removesuffix(', tok/s')}: × {label}", task, rival))
    ours = [row for row in data["rows"].values() if row["name"] == OURS and row["samples"]]
    if not columns or not ours:
        return []
    body = []
    for row in ours:
        found = [ratio(row, rival, task) for _, task, rival in columns]
        body.append([f"{OURS} {row['layout']}", *("" if r is None else f"{r:.2f}" for r in found)])
    return markdown_table(["", *(column[0] for column in columns)], body)


def matches(layout: str, wanted: str) -> bool:
    """``int4 g64`` is an ``int4``; ``bf16, compiled`` is no plain ``bf16``."""
    return layout == wanted or layout.startswith(f"{wanted} ")


def ratio(row: Row, rival: Row, task: str) -> float | None:
    """Median over the rounds that both took of one's speed in multiples of the other's; None without such rounds."""
    theirs = {(s["run"], s["round"]): s["tokens_per_second"] for s in rival["samples"].get(task, [])}
    pairs = [
        sample["tokens_per_second"] / theirs[place]
        for sample in row["samples"].get(task, [])
        if (place := (sample["run"], sample["round"])) in theirs
    ]
    return statistics.median(pairs) if pairs else None


def loading(pairs: list[dict[str, Any]]) -> list[str]:
    """A saved checkpoint: seconds to its first token in multiples of the seconds to read its bytes, and memory held."""
    header = ["saved int4 checkpoint", "bytes", "read, s", "load, s", "load to first token, s", "× reading"]
    header += ["anonymous memory held", "the model's tensors"]
    body = []
    for cold in (True, False):
        found = [pair for pair in pairs if pair["cold"] is cold]
        if not found:
            continue
        first = [pair["first_token"] for pair in found]
        times = statistics.median(pair["first_token"]["seconds"] / pair["read"]["seconds"] for pair in found)
        body.append(
            [
                "from disk" if cold else "from the page cache",
                amount(found[0]["read"]["bytes"]),
                f"{statistics.median(pair['read']['seconds'] for pair in found):.2f}",
                f"{statistics.median(one['load_seconds'] for one in first):.2f}",
                f"{statistics.median(one['seconds'] for one in first):.2f}",
                f"{times:.2f}",
                amount(round(statistics.median(one["anonymous_bytes"] for one in first))),
                amount(first[0]["model_bytes"]),
            ]
        )
    return markdown_table(header, body)


def note(data: dict[str, Any]) -> str:
    """How the figures were taken, and how quiet the machine was."""
    machine = data["environment"]
    samples = [s for row in data["rows"].values() for taken in row["samples"].values() for s in taken]
    rounds = max((len(taken) for row in data["rows"].values() for taken in row["samples"].values()), default=0)
    text = (
        f"{data['model']}; {machine['cpu']}, {data['threads']} threads; median (lowest – highest) of {rounds} rounds "
        f"in which all take turns; decode of {data['tokens']} tokens ({data['batch_tokens']} each of several sequences "
        f"at once) after a prompt of {data['prompt']}"
    )
    if data["bandwidth"]:
        text += f"; read bandwidth {spread(data['bandwidth'])} GB/s"
    busy = [s["others"] for s in samples if s["others"] is not None]
    if busy:
        text += f"; other programs kept {statistics.median(busy):.2f} cores busy (at most {max(busy):.2f})"
    if len({s["run"] for s in samples}) > 1:
        text += "; not all rows were measured in the same run"
    return text + "."


def draw(data: dict[str, Any], target: Path) -> None:
    """Bars with the lowest and the highest round as whiskers, one panel per measurement, into a .png or .svg file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = measured(data)
    rows = [row for row in data["rows"].values() if row["samples"]]
    if not names:
        raise ValueError("there are no figures to draw")
    with matplotlib.rc_context({"svg.hashsalt": "hf-quant", "font.size": 9, "text.color": INK}):
        size = (1.6 + 2.9 * len(names), 0.9 + 0.27 * len(rows))
        figure, panels = pyplot.subplots(1, len(names), figsize=size, sharey=True, squeeze=False, facecolor=PAGE)
        for task, axes in zip(names, panels[0], strict=True):
            _panel(axes, task, rows)
        panels[0][0].set_yticks(range(len(rows)), [f"{row['name']} {row['layout']}" for row in rows])
        panels[0][0].invert_yaxis()
        figure.suptitle(f"{data['model']}, {data['threads']} threads of {data['environment']['cpu']}", fontsize=10)
        figure.tight_layout()
        buffer = io.BytesIO()
        metadata = {"Date": None} if target.suffix == ".svg" else None
        figure.savefig(buffer, format=target.suffix.removeprefix("."), dpi=DPI, facecolor=PAGE, metadata=metadata)
        pyplot.close(figure)
    atomic_write(target, buffer.getvalue())


def _panel(axes: Any, task: str, rows: list[Row]) -> None:
    """The bars of one measurement; a row without it has none."""
    axes.set_facecolor(PAGE)
    axes.set_title(title(task), fontsize=9, color=INK)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    top = max((max(values(row, task), default=0.0) for row in rows), default=0.0)
    for place, row in enumerate(rows):
        figures = values(row, task)
        if not figures:
            continue
        middle = statistics.median(figures)
        whiskers = [[middle - min(figures)], [max(figures) - middle]]
        color = QUANTIZED if row["name"] == OURS else FLOAT
        axes.barh(place, middle, height=0.7, color=color, xerr=whiskers, error_kw={"ecolor": INK, "elinewidth": 0.8})
        text = f"{middle:,.0f}" if middle >= 100 else f"{middle:.1f}"
        axes.text(max(figures) + 0.02 * top, place, text, va="center", fontsize=8, color=INK)
    axes.set_xlim(0, 1.2 * top if top else 1)
