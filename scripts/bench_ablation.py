"""What each rung of the calibrated method gains: KL on held-out windows, one rung more per row, and one left out.

usage: python scripts/bench_ablation.py [--model DIR] [--samples N] [--tune STEPS] [--block-steps STEPS] [--bits 4] ...

Every row quantizes the same layers on the same calibration tokens (the part of the built-in texts that no evaluation
window is cut from) into the same format, and is measured as by scripts/bench_accuracy.py. The rows of --tune and
--block-steps go on from the last rung, each for itself. With --json, rows that the file has are not run again.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import (  # type: ignore[import-not-found]
    built_in_windows,
    default_model,
    float_answers,
    float_model,
    label_of,
    measure,
    publish,
    record,
    recorded,
)
from transformers import AutoTokenizer

from hf_quant import HfQuantConfig
from hf_quant.calibration import CalibrationData, load_calibration
from hf_quant.checkpoint.journal import Journal, open_journal
from hf_quant.evaluation.divergence import Reference
from hf_quant.evaluation.sources import quiet_loading
from hf_quant.evaluation.stream import LogitStream
from hf_quant.evaluation.table import markdown_table
from hf_quant.evaluation.text import BUILT_IN
from hf_quant.integrations.shell import open_shell
from hf_quant.plan import Plan
from hf_quant.quantize.contracts import Rungs
from hf_quant.quantize.distill import distill
from hf_quant.quantize.fold import SAMPLES, FoldedWeights, Folds, find_folds
from hf_quant.quantize.reconstruct import reconstruct
from hf_quant.quantize.sensitivity import take_samples
from hf_quant.quantize.sequential import calibrate
from hf_quant.quantize.weight import quantize_weight
from hf_quant.skeleton import model_class, plan_directory, read_settings
from hf_quant.tensor import QuantizedTensor

_MARKS = ("<!-- table:ablation -->", "<!-- /table:ablation -->")
_NONE = {"drift": False, "residual": False, "loudness": False, "refit": False}
BLOCKS, TUNED = "blocks", "tuned"


@dataclass(frozen=True)
class Row:
    """One way to quantize.

    Attributes:
        key: what the table calls it.
        method: without data: absmax or search; else gptq.
        rungs: of the walk.
        fold: input channels are rescaled first.
        then: what goes on from there: BLOCKS, TUNED or nothing.
        steps: of that.
    """

    key: str
    method: str = "gptq"
    rungs: Mapping[str, bool] = field(default_factory=dict)
    fold: bool = False
    then: str = ""
    steps: int = 0


LADDER = (
    Row("round to nearest", "absmax"),
    Row("data-free search", "search"),
    Row("data-free search of folded weights", "search", fold=True),
    Row("Hessian-guided rounding", rungs=_NONE),
    Row("+ aim at the float model's outputs", rungs={**_NONE, "drift": True}),
    Row("+ undo the residual stream's error", rungs={**_NONE, "drift": True, "residual": True}),
    Row("+ weigh tokens by their stream", rungs={"refit": False}),
    Row("+ refit scales"),
    Row("+ fold input channels (= balanced)", fold=True),
)


def rows(block_steps: int, steps: int) -> list[Row]:
    """The ladder, and what may follow on it."""
    found = list(LADDER)
    if block_steps:
        key = f"balanced, then the scales of every block alone, {block_steps} steps each"
        found.append(Row(key, fold=True, then=BLOCKS, steps=block_steps))
    if steps:
        key = f"balanced, then scales and norms end to end, {steps} steps"
        found.append(Row(key, fold=True, then=TUNED, steps=steps))
    return found


@dataclass(frozen=True)
class Bench:
    """What all rows have in common."""

    model: Path
    plan: Plan
    data: CalibrationData
    references: dict[str, Reference]
    scratch: Path

    def run(self, row: Row) -> dict[str, Any]:
        """Quantize and measure."""
        shell, plain = open_shell(self.model, model_class(read_settings(self.model)), self.plan)
        before = time.perf_counter()
        folds = Folds()
        if row.fold:
            samples, dtype = take_samples(self.data.batches, SAMPLES), getattr(torch, self.plan.scale_dtype)
            folds = find_folds(shell, self.plan.quantized, plain, samples, self.data.source, dtype)
        weights = FoldedWeights(plain, folds)
        floats = dict(folds.floats)
        if row.method != "gptq":
            tensors = {
                layer.name: quantize_weight(weights.weight(layer), layer.scheme, row.method)
                for layer in self.plan.quantized
                if layer.scheme
            }
        else:
            # rows that go on from another begin with what it left here
            walked = ",".join(f"{key}={value}" for key, value in row.rungs.items()) + f"-{row.fold}"
            journal = open_journal(self.scratch / walked, {})
            with folds.in_place(shell):
                if not all(layer.name in journal for layer in self.plan.quantized):
                    calibrate(shell, self.plan, self.data, weights, journal, rungs=Rungs(**row.rungs))
                if row.then:
                    before = time.perf_counter()
                changed, trained = self._then(row, shell, weights, journal)
            tensors = {
                layer.name: changed[layer.name] if layer.name in changed else journal.tensor(layer.name)
                for layer in self.plan.quantized
            }
            floats |= trained
        seconds = time.perf_counter() - before
        return {"key": row.key, "seconds": seconds, "kl": self._judged(tensors, floats)}

    def _then(
        self, row: Row, shell: Any, weights: FoldedWeights, journal: Journal
    ) -> tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]:
        """Tensors and float vectors that changed after the walk."""
        if row.then == TUNED:
            settings = HfQuantConfig(preset="best", tuning={"steps": row.steps}).tuning
            return distill(shell, self.plan, self.data, weights, journal.tensor, settings or {})
        changed: dict[str, QuantizedTensor] = {}
        if row.then == BLOCKS:

            def keep(block: str, tensors: Mapping[str, QuantizedTensor]) -> None:
                changed.update(tensors)

            def tensor(name: str) -> QuantizedTensor:
                return changed[name] if name in changed else journal.tensor(name)

            reconstruct(shell, self.plan, self.data, weights, tensor, keep, lambda block: False, row.steps)
        return changed, {}

    def _judged(self, tensors: Mapping[str, QuantizedTensor], floats: Mapping[str, torch.Tensor]) -> dict[str, float]:
        candidate = float_model(self.model)
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameter, weight = candidate.get_parameter(f"{name}.weight"), tensor.dequantize()
                parameter.copy_(weight.t() if type(candidate.get_submodule(name)).__name__ == "Conv1D" else weight)
            for name, value in floats.items():
                candidate.get_parameter(name).copy_(value)
        texts = measure(self.references, LogitStream(candidate, "candidate"))
        return {name: text["kl"]["value"] for name, text in texts.items()}


def main() -> None:
    """Run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a float model (default: the demo's SmolLM2)")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument(
        "--sample-length", type=int, help="tokens of a calibration sequence (default: as in the presets)"
    )
    parser.add_argument("--tune", type=int, default=0, metavar="STEPS", help="add a row with that many tuning steps")
    parser.add_argument(
        "--block-steps", type=int, default=0, metavar="STEPS", help="add a row with that many steps for every block"
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--grid", default="int")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write the figures here after every row, and go on from there")
    parser.add_argument("--fill", type=Path, help="write the table between the marks of this Markdown file")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model: Path = arguments.model or default_model()
    scheme = {"bits": arguments.bits, "group_size": arguments.group_size, "grid": arguments.grid}
    plan = plan_directory(model, HfQuantConfig(preset="balanced", **scheme))
    given = {} if arguments.sample_length is None else {"length": arguments.sample_length}
    protocol = {
        "model": label_of(arguments.model),
        "samples": arguments.samples,
        "windows": arguments.windows,
        "length": arguments.length,
        **({"sample_length": arguments.sample_length} if given else {}),
        **scheme,
    }
    done = recorded(arguments.json, protocol)
    wanted = rows(arguments.block_steps, arguments.tune)
    missing = [row for row in wanted if row.key not in done]
    with quiet_loading(), tempfile.TemporaryDirectory() as scratch:
        if missing:
            data = load_calibration("docs+prose", directory=model, samples=arguments.samples, seed=0, **given)
            cuts = built_in_windows(AutoTokenizer.from_pretrained(model), arguments.windows, arguments.length, 0)
            bench = Bench(model, plan, data, float_answers(model, cuts), Path(scratch))
        for row in missing:
            done[row.key] = bench.run(row)
            print(done[row.key], file=sys.stderr, flush=True)
            record(arguments.json, {**protocol, "rows": list(done.values())})
            gc.collect()
    body = [
        [
            row.key,
            " / ".join(f"{done[row.key]['kl'][name]:.3g}" for name in BUILT_IN),
            f"{done[row.key]['seconds']:.0f}",
        ]
        for row in wanted
    ]
    lines = markdown_table([plan.quantized[0].scheme.label, f"KL {' / '.join(BUILT_IN)}", "seconds"], body)  # type: ignore[union-attr]
    publish(lines, None, arguments.fill, _MARKS)


if __name__ == "__main__":
    main()
