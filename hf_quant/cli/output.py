"""How the command line prints: consoles, sizes, tables, errors and progress."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from hf_quant.plan import Plan, PlannedLayer
    from hf_quant.plan_parallel import Parallel

ARGUMENTS = "hf_quant.arguments"  # key of a typer context: what was typed after the program's name
_PLAIN_WIDTH = 160  # a log or a pipe has no width of its own: wide enough that no table is cut
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else _PLAIN_WIDTH)


out = _console(stderr=False)
err = _console(stderr=True)


def print_error(problem: str, fix: str) -> None:
    """Two lines on stderr: what is wrong, and what to do (never wrapped inside a word, never read as markup)."""
    err.print(Text.assemble(("error: ", "bold red"), problem), soft_wrap=True)
    if fix:
        err.print(Text.assemble(("fix:   ", "bold green"), fix), soft_wrap=True)


def print_json(data: Any) -> None:
    """Machine-readable output: the only thing on stdout when ``--json`` is given."""
    sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")


def size(count: int) -> str:
    """Bytes in decimal units: ``1.24 GB``, ``96.3 MB``, ``512 B``."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 100 * scale else f"{count / scale:.0f} {unit}"
    return f"{count} B"


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> Table:
    """A borderless table; the columns named in ``right`` hold numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", header_style="dim", overflow="fold")
    return made


@contextmanager
def step(title: str) -> Iterator[None]:
    """A spinner with the elapsed time on stderr while something without measurable progress runs."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=err,
        transient=not err.is_terminal,
    ) as progress:
        task = progress.add_task(title, total=1)
        yield
        progress.update(task, completed=1)


def quiet_libraries() -> None:
    """Keep transformers' and the hub's own log lines off the screen; their progress bars stay."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("transformers", "huggingface_hub", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def grouped_name(name: str) -> str:
    """A module name with the numbers of its blocks replaced: ``model.layers.*.mlp.up_proj``."""
    return _NUMBER.sub("*", name)


def _grouped(layers: tuple[PlannedLayer, ...]) -> list[tuple[str, list[PlannedLayer]]]:
    """Layers that differ only in the number of their block, in order of appearance."""
    groups: dict[tuple[object, ...], list[PlannedLayer]] = {}
    for layer in layers:
        key = (grouped_name(layer.name), layer.kind, layer.shape, layer.scheme, layer.method, layer.note)
        groups.setdefault(key, []).append(layer)
    return [(grouped_name(group[0].name) if len(group) > 1 else group[0].name, group) for group in groups.values()]


def print_plan(plan: Plan) -> None:
    """The plan as a compact table: one row for all blocks alike, then what stays in float and why, then the totals."""
    quantized = table(
        "quantized", "×", "kind", "shape", "to", "method", "before", "after", "note", right=("×", "before", "after")
    )
    for name, group in _grouped(plan.quantized):
        first = group[0]
        quantized.add_row(
            name,
            str(len(group)),
            first.kind,
            " × ".join(map(str, first.shape)),
            first.scheme.label if first.scheme else "",
            first.method,
            size(sum(layer.float_bytes for layer in group)),
            size(sum(layer.planned_bytes for layer in group)),
            first.note,
        )
    for layer in plan.layers:
        if layer.shares:
            shape = " × ".join(map(str, layer.shape))
            quantized.add_row(layer.name, "1", layer.kind, shape, f"table of {layer.shares}", "", size(0), size(0), "")
    out.print(quantized)
    reasons: dict[tuple[str, str], list[PlannedLayer]] = {}
    for layer in plan.kept:
        if layer.shares:
            continue
        reasons.setdefault((layer.kind, layer.note), []).append(layer)
    kept = table("left in float", "×", "kind", "bytes", "why", right=("×", "bytes"))
    for (kind, note), group in reasons.items():
        patterns = list(dict.fromkeys(grouped_name(layer.name) for layer in group))
        shown = patterns[0] if len(patterns) == 1 else f"{patterns[0]} and {len(patterns) - 1} more"
        kept.add_row(shown, str(len(group)), kind, size(sum(layer.float_bytes for layer in group)), note)
    if reasons:
        out.print()
        out.print(kept)
    out.print()
    ratio = plan.float_bytes / plan.planned_bytes
    out.print(
        f"[bold]{plan.architecture}[/bold] ({plan.model_type}), {len(plan.quantized)} of {len(plan.layers)} weights "
        f"quantized, {plan.bits_per_weight:.2f} bits per quantized weight, published as {plan.format}, "
        f"scales in {plan.scale_dtype}"
    )
    out.print(
        f"weights {size(plan.float_bytes)} → [bold]{size(plan.planned_bytes)}[/bold] ({ratio:.2f} × smaller); "
        f"peak memory of quantizing about {size(plan.peak_bytes)} plus the interpreter{_calibrating(plan)}"
    )


def _calibrating(plan: Plan) -> str:
    calibrated = any(layer.method == "gptq" for layer in plan.quantized)
    return "; calibrating comes first and needs the activations of its samples" if calibrated else ""


def print_split(split: Parallel) -> None:
    """A plan over several devices: one row for all blocks alike, with one device's shard or what does not divide."""
    groups: dict[tuple[object, ...], int] = {}
    for layer in split.layers:
        key = (grouped_name(layer.name), layer.role, layer.shape, layer.problem)
        groups[key] = groups.get(key, 0) + 1
    rows = table(f"over {split.devices} devices", "×", "split by", "shard", "problem", right=("×",))
    by = {"column": "outputs", "row": "inputs", "replicated": "copied to each"}
    for (name, role, shape, problem), count in groups.items():
        assert isinstance(shape, tuple)
        shard = "" if problem else " × ".join(map(str, shape))
        rows.add_row(str(name), str(count), by[str(role)], shard, f"[red]{problem}[/red]" if problem else "")
    out.print()
    out.print(rows)
    if split.note:
        out.print(split.note)


def plan_data(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for ``--json``: every weight and the totals (bytes)."""
    return {
        "architecture": plan.architecture,
        "model_type": plan.model_type,
        "format": plan.format,
        "scale_dtype": plan.scale_dtype,
        "float_bytes": plan.float_bytes,
        "planned_bytes": plan.planned_bytes,
        "peak_bytes": plan.peak_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "scheme": layer.scheme.label if layer.scheme else None,
                "method": layer.method,
                "rule": layer.rule,
                "note": layer.note,
                "float_bytes": layer.float_bytes,
                "planned_bytes": layer.planned_bytes,
            }
            for layer in plan.layers
        ],
    }
