"""A comparison as a table: rich for a terminal, Markdown for files."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text as RichText

from hf_quant.card_text import amount, significant
from hf_quant.comparison.result import Comparison, Entry
from hf_quant.evaluation.results import Interval
from hf_quant.evaluation.table import markdown_table


def render(comparison: Comparison) -> Group:
    """For a terminal."""
    header, rows = _table(comparison)
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(header):
        table.add_column(column, justify="right" if i > 1 else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    notes = [RichText(line, style="dim") for line in _notes(comparison)]
    return Group(RichText(_heading(comparison)), RichText(), table, RichText(), *notes)


def markdown(comparison: Comparison) -> str:
    """The same for a file."""
    header, rows = _table(comparison)
    lines = [f"**{_heading(comparison)}**", "", *markdown_table(header, rows), "", *_notes(comparison)]
    return "\n".join(lines) + "\n"


def _heading(comparison: Comparison) -> str:
    protocol = comparison.protocol
    windows = f"{protocol.windows} windows of {protocol.length} tokens per text" if protocol.length else ""
    how = ", ".join(part for part in (windows, protocol.dtype, "95 % intervals") if part)
    return f"{len(comparison.entries)} checkpoints against {comparison.reference} ({how})"


def _table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    first = comparison.entries[0]
    unit = "tok/s" if comparison.speed_unit == "tokens" else f"{comparison.speed_unit}/s"
    header = ["checkpoint", "format", "weights", "bits per weight"]
    header += [f"{_short(comparison.loss)}, {loss.name}" for loss in first.losses]
    header += ["agreement", unit if comparison.one_run else f"{unit} (× float)", "Pareto front"]
    fronts = zip(comparison.accurate(), comparison.fast(), strict=True)
    rows = [
        [
            entry.name,
            entry.format,
            amount(entry.disk_bytes),
            f"{entry.bits_per_weight:.2f}",
            *(_interval(loss.value) for loss in entry.losses),
            "" if entry.agreement is None else f"{entry.agreement:.1%}",
            _speed(entry),
            _place(accurate, fast),
        ]
        for entry, (accurate, fast) in zip(comparison.entries, fronts, strict=True)
    ]
    floors = [loss.noise_floor for loss in first.losses]
    if all(floor is not None for floor in floors):
        shown = [_interval(floor) for floor in floors if floor is not None]
        rows.append(["noise floor: float in 16 bits", "", "", "", *shown, "", "", ""])
    return header, rows


def _notes(comparison: Comparison) -> list[str]:
    here, entries = comparison.environment, comparison.entries
    lines = [
        f"Loss is {comparison.loss}. The Pareto front: no other checkpoint here is better in one of bytes and loss (or "
        "bytes and speed) and as good in the other."
    ]
    if comparison.one_run:
        lines.append(f"Speeds: batch 1, bfloat16, all in turns in one run on {here.cpu}, {here.cores} cores.")
    elif any(entry.speed_ratio is not None for entry in entries):
        lines.append(
            "Speeds are of different runs, perhaps on different machines: compare the ratios to the float model, which "
            "took turns with each, or measure them together with --speed."
        )
    recorded = sum(entry.measured == "recorded" for entry in entries)
    lines.append(f"{recorded} of {len(entries)} results were recorded beside the checkpoints, the others measured now.")
    return lines


def _short(loss: str) -> str:
    return "KL" if loss.startswith("KL(") else loss


def _interval(interval: Interval) -> str:
    return f"{significant(interval.value)} ({significant(interval.low)} – {significant(interval.high)})"


def _speed(entry: Entry) -> str:
    if entry.decode_tokens_per_second is None:
        return ""
    ratio = "" if entry.speed_ratio is None else f" ({entry.speed_ratio:.2f}×)"
    return f"{entry.decode_tokens_per_second:.1f}{ratio}"


def _place(accurate: bool, fast: bool) -> str:
    return " and ".join(name for name, on in (("accuracy", accurate), ("speed", fast)) if on)
