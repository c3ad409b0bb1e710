"""Results as tables: rich for a terminal, Markdown for files."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text as RichText

from hf_quant.evaluation.depth_results import TextDepth
from hf_quant.evaluation.results import EvaluationResult, Figures, Interval, SpeedResult, ThroughputResult
from hf_quant.evaluation.task_table import HEADER, task_rows

_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def render(result: EvaluationResult) -> Group:
    """Accuracy, size and speed as rich tables under one heading."""
    protocol = result.protocol
    windows = f"{protocol.windows} windows of {protocol.length} tokens per text, " if protocol.length else ""
    heading = RichText(f"{result.candidate} against {result.reference}: {windows}{protocol.dtype}, 95 % intervals")
    parts: list[RichText | Table] = [heading]
    for title, header, rows in _tables(result):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for i, column in enumerate(header):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        parts += [RichText(), table]
    return Group(*parts)


def markdown(result: EvaluationResult) -> str:
    """The same tables as Markdown."""
    lines = []
    for title, header, rows in _tables(result):
        lines += [f"**{title}**", "", *markdown_table(header, rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table: the first column to the left, the others to the right."""
    ruler = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (header, ruler, *rows)]


def _tables(result: EvaluationResult) -> list[tuple[str, list[str], list[list[str]]]]:
    tables = [("Accuracy", *_texts(result))] if result.texts else []
    tables += [
        (f"Where it was lost: {text.name}", *_slices(text.depth)) for text in result.texts if text.depth is not None
    ]
    tables += _samples(result)
    tables.append(("Size", *_size(result)))
    if result.speed:
        tables.append(("Speed", *_speed(result.speed)))
        if any(run.batch is not None for run in result.speed):
            tables.append(("Memory and bandwidth", *_memory(result.speed)))
    if result.tasks:
        tables.append(("Tasks", HEADER, [row.cells for row in task_rows(result.tasks)]))
    if result.throughput:
        tables.append(("Speed", *_throughput(result.throughput)))
    return tables


def _samples(result: EvaluationResult) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table for every group of samples that have the same figures."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for samples in result.samples:
        rows = tables.setdefault(tuple(figure.title for figure in samples.figures), [])
        name = f"{samples.name} ({samples.samples} {samples.unit})"
        for label, values in samples.rows():
            shown = [_figure(figure.unit, value) for figure, value in zip(samples.figures, values, strict=True)]
            rows.append([name, label, *shown])
            name = ""
    return [("Accuracy", ["samples", "model", *titles], rows) for titles, rows in tables.items()]


def _figure(unit: str, interval: Interval | None) -> str:
    if interval is None:
        return ""
    if unit == "share":
        return _interval(interval, 2, 100) + " %"
    if unit == "percent":
        return _interval(interval, 2) + " %"
    return f"{interval.value:.3g} ({interval.low:.3g} – {interval.high:.3g})"


def _throughput(runs: tuple[ThroughputResult, ...]) -> tuple[list[str], list[list[str]]]:
    header = [f"{runs[0].threads} threads", "dtype", "load s", f"{runs[0].unit} per second", "kernels (layers)"]
    return header, [
        [run.model, run.dtype, f"{run.load_seconds:.2f}", f"{run.samples_per_second:.1f}", _kernels(run.kernels)]
        for run in runs
    ]


def _kernels(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _texts(result: EvaluationResult) -> tuple[list[str], list[list[str]]]:
    header = ["text", "model", "perplexity", "increase", "KL (nats/token)", "KL p99", "top-1 agreement"]
    rows = []
    for text in result.texts:
        rows.append([text.name, "float", _interval(text.perplexity_float, 2), "", "", "", ""])
        rows.append(
            [
                "",
                "quantized",
                _interval(text.perplexity_quantized, 2),
                f"{_interval(text.perplexity_increase_percent, 2)} %",
                _interval(text.kl, 4) + ("" if text.kl_error is None else f", estimated ± {text.kl_error:.1g}"),
                f"{text.kl_p99:.3g}",
                _interval(text.top1_agreement, 2, 100) + " %",
            ]
        )
        floor = text.noise_floor
        others: tuple[tuple[str, Figures | None], ...] = (
            ("quantized, int8 activations", text.int8_activations),
            ("" if floor is None else f"noise floor: float in {floor.dtype}", floor),
        )
        for label, found in others:
            if found is not None:
                agreement = _interval(found.top1_agreement, 2, 100) + " %"
                rows.append(["", label, _interval(found.perplexity, 2), "", _interval(found.kl, 4), "", agreement])
    return header, rows


def _slices(depth: TextDepth) -> tuple[list[str], list[list[str]]]:
    header = ["positions", "share", "KL (nats/token)", "noise floor", "top-1 agreement"]
    rows = []
    for what, slices in (("float top-1", depth.by_confidence), ("token", depth.by_position)):
        for part in slices:
            floor = f"{part.noise_floor_kl.value:.2g}" if part.noise_floor_kl is not None else ""
            agreement = _interval(part.top1_agreement, 2, 100) + " %"
            rows.append([f"{what} {part.name}", f"{100 * part.share:.1f} %", _interval(part.kl, 4), floor, agreement])
    return header, rows


def _size(result: EvaluationResult) -> tuple[list[str], list[list[str]]]:
    size = result.size
    on_disk = f"float ({result.reference_stored_dtype} on disk)" if result.reference_stored_dtype else "float"
    header = ["", on_disk, "quantized", "ratio"]
    rows = [
        ["weights on disk", amount(size.float_disk_bytes), amount(size.quantized_disk_bytes)],
        [
            f"tensors in memory ({size.memory_dtype})" if size.memory_dtype else "tensors in memory",
            amount(size.float_memory_bytes),
            amount(size.quantized_memory_bytes),
        ],
    ]
    ratios = (
        size.float_disk_bytes / max(1, size.quantized_disk_bytes),
        size.float_memory_bytes / max(1, size.quantized_memory_bytes),
    )
    rows = [[*row, f"{ratio:.2f}×"] for row, ratio in zip(rows, ratios, strict=True)]
    rows.append(["bits per quantized weight", "", f"{size.bits_per_weight:.2f}", ""])
    return header, rows


def _speed(speeds: tuple[SpeedResult, ...]) -> tuple[list[str], list[list[str]]]:
    first = speeds[0]
    header = [
        f"{first.threads} threads",
        "dtype",
        "load s",
        f"prefill of {first.prefill_tokens}, tok/s",
        f"decode of {first.decode_tokens}, tok/s",
        "kernels (layers)",
    ]
    rows = [
        [
            run.model,
            run.dtype,
            f"{run.load_seconds:.2f}",
            f"{run.prefill_tokens_per_second:,.0f}",
            f"{run.decode_tokens_per_second:.1f}",
            _kernels(run.kernels),
        ]
        for run in speeds
    ]
    return header, rows


def _memory(speeds: tuple[SpeedResult, ...]) -> tuple[list[str], list[list[str]]]:
    first = speeds[0]
    bandwidth = "" if first.read_bandwidth is None else f" (of {first.read_bandwidth:.1f} GB/s)"
    header = [
        f"{first.batch} sequences",
        f"first token after {first.prefill_tokens}, s",
        f"prefill of {first.batch} × {first.batch_prefill_tokens}, tok/s",
        f"decode of {first.batch}, tok/s",
        "peak memory",
        f"read per token{bandwidth}",
    ]
    return header, [
        [
            run.model,
            _known(run.first_token_seconds, ".3f"),
            _known(run.batch_prefill_tokens_per_second, ",.0f"),
            _known(run.batch_decode_tokens_per_second, ".1f"),
            "" if run.peak_bytes is None else amount(run.peak_bytes),
            ("" if run.token_bytes is None else amount(run.token_bytes))
            + ("" if run.bandwidth_share is None else f" ({run.bandwidth_share:.0%})"),
        ]
        for run in speeds
    ]


def _known(value: float | None, spec: str) -> str:
    return "" if value is None else f"{value:{spec}}"


def amount(count: int) -> str:
    """Bytes in decimal units: ``1.24 GB``, ``96.3 MB``, ``512 B``."""
    for unit, scale in _UNITS:
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 100 * scale else f"{count / scale:.0f} {unit}"
    return f"{count} B"


def _interval(interval: Interval, digits: int, factor: float = 1.0) -> str:
    value, low, high = (factor * v for v in (interval.value, interval.low, interval.high))
    return f"{value:.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"
