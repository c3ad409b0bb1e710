"""What each rung of the calibrated method gains: KL on held-out windows, one rung more per row, and one left out.

usage: python scripts/bench_ablation.py [--model DIR] [--samples N] [--tune STEPS] [--bits 4] [--group-size 64] ...

Every row quantizes the same layers on the same calibration tokens (the part of the built-in texts that no evaluation
window is cut from) into the same format, and is measured as by scripts/bench_accuracy.py. With --json, rows that the
file has are not run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_accuracy import default_model, fill_between, measure  # type: ignore[import-not-found]
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_quant import HfQuantConfig
from hf_quant.calibration import load_calibration
from hf_quant.checkpoint import atomic_write
from hf_quant.checkpoint.journal import open_journal
from hf_quant.evaluation.divergence import run_reference
from hf_quant.evaluation.sources import quiet_loading
from hf_quant.evaluation.stream import LogitStream
from hf_quant.evaluation.table import markdown_table
from hf_quant.evaluation.text import BUILT_IN, cut_windows, load_text
from hf_quant.integrations.shell import open_shell
from hf_quant.quantize.contracts import Rungs
from hf_quant.quantize.distill import distill
from hf_quant.quantize.sequential import calibrate
from hf_quant.quantize.weight import quantize_weight
from hf_quant.skeleton import model_class, plan_directory, read_settings
from hf_quant.tensor import QuantizedTensor

_MARKS = ("<!-- table:ablation -->", "<!-- /table:ablation -->")
_NONE = {"drift": False, "residual": False, "loudness": False, "refit": False}
# each row: what it is called, and the rungs that it uses (None: without data)
ROWS: dict[str, dict[str, bool] | None] = {
    "round to nearest": None,
    "data-free search": None,
    "+ Hessian-guided rounding": _NONE,
    "+ aim at the float model's outputs": {**_NONE, "drift": True},
    "+ undo the residual stream's error": {**_NONE, "drift": True, "residual": True},
    "+ weigh tokens by their stream": {**_NONE, "drift": True, "residual": True, "loudness": True},
    "+ refit scales (= balanced)": {},
}
TUNED = "+ tune scales and norms end to end"


def main() -> None:
    """Run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a float model (default: the demo's SmolLM2)")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tune", type=int, default=0, metavar="STEPS", help="add a row with that many tuning steps")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--grid", default="int")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fill", type=Path, help="write the table between the marks of this Markdown file")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model: Path = arguments.model or default_model()
    scheme = {"bits": arguments.bits, "group_size": arguments.group_size, "grid": arguments.grid}
    plan = plan_directory(model, HfQuantConfig(preset="balanced", **scheme))
    protocol = {"model": model.resolve().name, "samples": arguments.samples, "windows": arguments.windows, **scheme}
    done: dict[str, Any] = {}
    if arguments.json and arguments.json.is_file():
        before = json.loads(arguments.json.read_text(encoding="utf-8"))
        if before["protocol"] != protocol:
            sys.exit(f"{arguments.json} holds figures of another protocol: remove it or name another file")
        done = before["rows"]
    data = load_calibration("docs+prose", directory=model, samples=arguments.samples, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with quiet_loading(), tempfile.TemporaryDirectory() as scratch:
        stream = LogitStream(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), "float")
        cuts = {name: cut_windows(load_text(name), tokenizer, arguments.windows, 512, 0).ids for name in BUILT_IN}
        references = {name: run_reference(stream, ids) for name, ids in cuts.items()}
        kind = model_class(read_settings(model))

        def judged(tensors: Mapping[str, QuantizedTensor], floats: Mapping[str, torch.Tensor]) -> dict[str, float]:
            candidate = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
            with torch.no_grad():
                for name, tensor in tensors.items():
                    candidate.get_parameter(f"{name}.weight").copy_(tensor.dequantize())
                for name, value in floats.items():
                    candidate.get_parameter(name).copy_(value)
            texts = measure(references, LogitStream(candidate, "candidate"), 0, None)
            return {name: text["kl"]["value"] for name, text in texts.items()}

        def keep(title: str, started: float, tensors: Any, floats: Any = None) -> None:
            seconds = time.perf_counter() - started
            done[title] = {"seconds": seconds, "kl": judged(tensors, floats or {})}
            print(title, done[title], file=sys.stderr, flush=True)
            if arguments.json:
                atomic_write(arguments.json, json.dumps({"protocol": protocol, "rows": done}, indent=1) + "\n")
            gc.collect()

        steps = arguments.tune and TUNED not in done
        for number, (title, rungs) in enumerate(ROWS.items()):
            last = number == len(ROWS) - 1
            if title in done and not (last and steps):
                continue
            shell, weights = open_shell(model, kind, plan)
            started = time.perf_counter()
            if rungs is None:
                method = "absmax" if title == "round to nearest" else "search"
                plain = {
                    layer.name: quantize_weight(weights.weight(layer), layer.scheme, method)
                    for layer in plan.quantized
                    if layer.scheme
                }
                keep(title, started, plain)
                continue
            journal = open_journal(Path(scratch) / f"journal-{number}", {})
            calibrate(shell, plan, data, weights, journal, rungs=Rungs(**rungs))
            if title not in done:
                keep(title, started, {layer.name: journal.tensor(layer.name) for layer in plan.quantized})
            if last and steps:
                started = time.perf_counter()
                settings = HfQuantConfig(preset="best", tuning={"steps": arguments.tune}).tuning
                tensors, floats = distill(shell, plan, data, weights, journal.tensor, settings or {})
                whole = {layer.name: tensors.get(layer.name) or journal.tensor(layer.name) for layer in plan.quantized}
                keep(TUNED, started, whole, floats)
    rows = [
        [title, " / ".join(f"{row['kl'][name]:.3g}" for name in BUILT_IN), f"{row['seconds']:.0f}"]
        for title in (*ROWS, TUNED)
        if (row := done.get(title))
    ]
    lines = markdown_table([plan.quantized[0].scheme.label, f"KL {' / '.join(BUILT_IN)}", "seconds"], rows)  # type: ignore[union-attr]
    if arguments.fill:
        fill_between(arguments.fill, lines, _MARKS)
    Console(width=10_000, soft_wrap=True, highlight=False, markup=False).print("\n".join(lines))


if __name__ == "__main__":
    main()
