"""What the benchmarks share: the float model's answers, a candidate's figures, rows kept in a file, tables written."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from hf_quant.checkpoint import atomic_write
from hf_quant.evaluation.bootstrap import Bootstrap
from hf_quant.evaluation.divergence import Reference, compare, run_reference
from hf_quant.evaluation.stream import LogitStream
from hf_quant.evaluation.text import BUILT_IN, Windows, cut_windows, load_text

BOOTSTRAP_SAMPLES = 10_000


def default_model() -> Path:
    """The demo's float SmolLM2 (built on first use)."""
    from hf_quant import demo

    return demo.float_checkpoint()


def label_of(model: Path | None) -> str:
    """How tables call a model; None is the default one."""
    return "SmolLM2-135M-Instruct" if model is None else model.resolve().name


def built_in_windows(tokenizer: Any, windows: int, length: int, seed: int) -> dict[str, Windows]:
    """The held-out windows of every built-in text."""
    return {name: cut_windows(load_text(name), tokenizer, windows, length, seed) for name in BUILT_IN}


def float_model(model: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The unquantized model."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()


def float_answers(model: Path, cuts: Mapping[str, Windows], advance: Any = None) -> dict[str, Reference]:
    """What the float model in float32 says on every text."""
    stream = LogitStream(float_model(model), "float")
    return {name: run_reference(stream, cut.ids, advance) for name, cut in cuts.items()}


def measure(
    references: Mapping[str, Reference], stream: LogitStream, seed: int = 0, advance: Any = None
) -> dict[str, Any]:
    """The figures of one model on every text."""
    found = {}
    for name, reference in references.items():
        divergence = compare(reference, stream, advance)
        summary = divergence.summary(Bootstrap(len(reference.ids), BOOTSTRAP_SAMPLES, seed))
        found[name] = {
            "kl": summary.kl.model_dump(),
            "kl_of_windows": divergence.kl.mean(axis=1).tolist(),
            "kl_p99": divergence.kl_p99,
            "perplexity_float": summary.perplexity_reference.model_dump(),
            "perplexity": summary.perplexity_model.model_dump(),
            "perplexity_increase_percent": summary.perplexity_increase_percent.model_dump(),
            "top1_agreement": summary.top1_agreement.model_dump(),
        }
    return found


def recorded(file: Path | None, protocol: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows that an earlier run left in a JSON file, by their key; exits when they are of another protocol."""
    if file is None or not file.is_file():
        return {}
    before = json.loads(file.read_text(encoding="utf-8"))
    if {key: before.get(key) for key in protocol} != dict(protocol):
        sys.exit(f"{file} holds figures of another protocol: remove it or name another file")
    return {row["key"]: row for row in before["rows"]}


def record(file: Path | None, data: Mapping[str, Any]) -> None:
    """Write the figures (protocol and ``rows``), if they are wanted in a file."""
    if file is not None:
        atomic_write(file, json.dumps(data, indent=1) + "\n")


def fill_between(path: Path, lines: Sequence[str], marks: tuple[str, str]) -> None:
    """Replace what stands between the marks of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    before, opening, rest = text.partition(marks[0])
    _, closing, after = rest.partition(marks[1])
    if not opening or not closing:
        sys.exit(f"{path} has no {marks[0]} ... {marks[1]}")
    atomic_write(path, f"{before}{opening}\n" + "\n".join(lines) + f"\n{closing}{after}")


def publish(
    lines: Sequence[str],
    markdown: Path | None,
    fill: Path | None,
    marks: tuple[str, str],
    short: Sequence[str] | None = None,
) -> None:
    """Print a table, write it to a file, and put it (or a short one) between the marks of another."""
    if markdown is not None:
        atomic_write(markdown, "\n".join(lines) + "\n")
    if fill is not None:
        fill_between(fill, lines if short is None else short, marks)
    Console(width=10_000, soft_wrap=True, highlight=False, markup=False).print("\n".join(lines))
