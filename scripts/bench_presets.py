"""The calibrated accuracy table: presets and budgets of hf-quant, their accuracy, time and memory.

usage: python scripts/bench_presets.py [--model DIR] [--json FILE] [--markdown FILE] [--fill README.md] [--only REGEX]

Each row is one `hf-quant quantize` command in a process of its own; seconds are its wall clock (imports included, so
`fast` is mostly imports), memory is the peak of its resident set. Calibration text is the part of the two built-in
texts that no evaluation window is cut from (`--calibration docs+prose`); the row "self" is calibrated on text that the
model sampled itself. What it wrote is measured as by scripts/bench_accuracy.py: KL(float || quantized) on 16 held-out
windows of 512 tokens of each text, weights expanded to float32, 95 % bootstrap intervals. With --json, rows that the
file has are not run again.
"""

from __future__ import annotations

import argparse
import gc
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
import transformers
from measuring import (  # type: ignore[import-not-found]
    built_in_windows,
    default_model,
    float_answers,
    label_of,
    measure,
    publish,
    record,
    recorded,
)
from transformers import AutoTokenizer

import hf_quant
from hf_quant.evaluation import environment
from hf_quant.evaluation.sources import quiet_loading
from hf_quant.evaluation.stream import LogitStream
from hf_quant.evaluation.table import markdown_table
from hf_quant.evaluation.text import BUILT_IN

_MARKS = ("<!-- table:presets -->", "<!-- /table:presets -->")
_TEXT = ("--calibration", "docs+prose")


@dataclass(frozen=True)
class Row:
    """One command."""

    layout: str
    preset: str
    flags: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.layout} | {self.preset}"


def rows() -> list[Row]:
    """Every layout at every rung."""
    layouts = {
        "int4 sym g64": ("--group-size", "64"),
        "int4 sym g32": (),
        "int4 asym g32": ("--asymmetric",),
        "nf4 g64 dq": ("--grid", "nf4"),
        "int8 sym g64": ("--bits", "8", "--group-size", "64"),
        "int8 sym per-channel": ("--bits", "8", "--group-size", "-1"),
        "mixed <= 4.25": ("--target-bits", "4.25"),
        "mixed <= 5.5": ("--target-bits", "5.5"),
    }
    found = []
    for layout, flags in layouts.items():
        if not layout.startswith("mixed"):
            found.append(Row(layout, "fast", (*flags, "--preset", "fast")))
        if layout == "int4 sym g64":
            found.append(Row(layout, "balanced (self)", (*flags, "--preset", "balanced")))
        for preset in ("balanced", "best"):
            found.append(Row(layout, preset, (*flags, "--preset", preset, *_TEXT)))
    return found


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command; its output goes to our stderr."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            peak = max(peak, watched.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    if process.wait():
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return time.perf_counter() - started, peak


def table(data: dict[str, Any]) -> list[str]:
    """Markdown of the rows that are there."""
    names = data["texts"]
    header = ["stored as", "preset", "bits per weight", f"KL {' / '.join(names)}", "top-1", "seconds", "peak GB"]
    body = []
    for row in data["rows"]:
        texts = [row["texts"][name] for name in names]
        kl = " / ".join(f"{text['kl']['value']:.3g}" for text in texts)
        agree = " / ".join(f"{100 * text['top1_agreement']['value']:.1f} %" for text in texts)
        cost = (f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e9:.1f}")
        body.append([row["layout"], row["preset"], f"{row['bits_per_weight']:.2f}", kl, agree, *cost])
    note = (
        f"{data['model']}, {data['threads']} threads; KL(float ‖ quantized) in nats per token and top-1 agreement on "
        f"{' / '.join(names)}, {data['windows']} × {data['length']} tokens each, disjoint from the calibration text; "
        "seconds and memory of the whole command."
    )
    return [*markdown_table(header, body), "", note]


def main() -> None:
    """Run, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a float model (default: the demo's SmolLM2)")
    parser.add_argument("--label", help="how the table calls the model")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only rows whose 'layout | preset' matches this regex")
    parser.add_argument("--keep", type=Path, help="keep the checkpoints in this directory")
    parser.add_argument("--json", type=Path, help="write the figures here after every row, and go on from there")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--fill", type=Path, help="write the table between the marks of this Markdown file")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model: Path = arguments.model or default_model()
    label = arguments.label or label_of(arguments.model)
    protocol = {
        "model": label,
        "texts": list(BUILT_IN),
        "windows": arguments.windows,
        "length": arguments.length,
        "seed": arguments.seed,
        "threads": torch.get_num_threads(),
    }
    done = recorded(arguments.json, protocol)
    missing = [row for row in rows() if re.search(arguments.only, row.key) and row.key not in done]
    data = {**protocol, "hf_quant": hf_quant.__version__, "environment": environment.describe().model_dump()}
    order = [row.key for row in rows()]
    references = None
    with tempfile.TemporaryDirectory() as scratch, quiet_loading():
        root = arguments.keep or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        for row in missing:
            target = root / re.sub(r"[^a-z0-9.]+", "-", row.key.lower()).strip("-")
            command = [sys.executable, "-m", "hf_quant.cli", "quantize", str(model), "-o", str(target), "--overwrite"]
            flags = list(row.flags)
            if "--target-bits" in flags:
                flags += ["--sensitivities", str(root / "sensitivities.json")] if row.preset == "balanced" else []
            print(f"{row.key}: hf-quant quantize MODEL {' '.join(flags)}", file=sys.stderr, flush=True)
            seconds, peak = run([*command, *flags])
            if references is None:
                tokenizer = AutoTokenizer.from_pretrained(model)
                cuts = built_in_windows(tokenizer, arguments.windows, arguments.length, arguments.seed)
                references = float_answers(model, cuts)
            found = hf_quant.load(target, dtype=torch.float32, kernel="reference")
            bits = found.config.hf_quant["bits_per_weight"]
            found = found.dequantize().to(torch.float32).eval()
            texts = measure(references, LogitStream(found, row.key), arguments.seed)
            size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
            done[row.key] = {
                "key": row.key,
                "layout": row.layout,
                "preset": row.preset,
                "flags": flags,
                "bits_per_weight": bits,
                "bytes": size,
                "seconds": seconds,
                "peak_bytes": peak,
                "texts": texts,
            }
            print({name: text["kl"]["value"] for name, text in texts.items()}, f"{seconds:.0f} s", file=sys.stderr)
            del found
            gc.collect()
            data["rows"] = sorted(done.values(), key=lambda entry: order.index(entry["key"]))
            record(arguments.json, data)
    data["rows"] = sorted(done.values(), key=lambda entry: order.index(entry["key"]))
    publish(table(data), arguments.markdown, arguments.fill, _MARKS)


if __name__ == "__main__":
    main()
