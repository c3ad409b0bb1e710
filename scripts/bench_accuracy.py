"""The data-free accuracy table: every grid and group of hf-quant beside round-to-nearest and bitsandbytes.

usage: python scripts/bench_accuracy.py [--model DIR] [--json FILE] [--markdown FILE] [--fill README.md] [--only REGEX]

The protocol is that of `hf-quant evaluate`: KL(float || quantized), perplexity and top-1 agreement on 16 held-out
windows of 512 tokens of each built-in text, float32, 95 % bootstrap intervals. Each row is a model that transformers
quantizes on load (HfQuantConfig with method absmax or search, or stock BitsAndBytesConfig). Its weights are then
expanded to float32, which is what the reference kernel and bitsandbytes compute with, so that all rows run at the speed
of the float model (LLM.int8 quantizes activations too and runs as it is). The float model runs over the windows once.

Group 128 stands for the largest power-of-two group up to 128 that divides each row (the layers of SmolLM2 have rows of
576 and 1536). A difference is a tie below 2 %, or when its interval (paired over windows) holds zero. Expect half an
hour on two cores that nothing else uses. With --json, rows that the file has from the same quantizer source are not
measured again. Exit code 3 when a row of ours is worse than its baseline and no tie.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import logging
import re
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from measuring import (  # type: ignore[import-not-found]
    BOOTSTRAP_SAMPLES,
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
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.evaluation import environment
from hf_quant.evaluation.bootstrap import Bootstrap
from hf_quant.evaluation.progress import Stages
from hf_quant.evaluation.sources import quiet_loading
from hf_quant.evaluation.stream import LogitStream
from hf_quant.evaluation.table import markdown_table
from hf_quant.evaluation.text import BUILT_IN

TIE = 2.0  # percent
OURS = "hf-quant"
LOST = 3  # exit code
_MARKS = ("<!-- table:accuracy -->", "<!-- /table:accuracy -->")
# What a reader of the README chooses between; the whole table is in the JSON and Markdown files.
_SHORT = (
    "int4 sym g32",
    "int4 sym g64",
    "int4 asym g32",
    "int4 asym g64",
    "nf4 g64 dq",
    "fp4 g64 dq",
    "int8 sym per-channel",
)


@dataclass(frozen=True)
class Row:
    """One way to quantize: ``layout`` is what is stored, ``method`` who chose the scales."""

    layout: str
    method: str
    config: Any
    baseline: bool

    @property
    def key(self) -> str:
        return f"{self.layout} | {self.method}"

    @property
    def code(self) -> str:
        """What made the row: a digest of our quantizer's source, or the versions of the other library's."""
        if isinstance(self.config, BitsAndBytesConfig):
            return f"bitsandbytes {metadata.version('bitsandbytes')}, transformers {transformers.__version__}"
        package = Path(hf_quant.__file__).parent
        files = sorted([*(package / "quantize").glob("*.py"), package / "grids.py", package / "plan.py"])
        digest = hashlib.sha256()
        for file in files:
            if not (self.baseline and file.name == "search.py"):  # the baseline does not search
                digest.update(file.name.encode() + file.read_bytes())
        return f"hf-quant {hf_quant.__version__}, {digest.hexdigest()[:16]}"


def rows() -> list[Row]:
    """All rows, each baseline before ours."""
    found = []
    for bits in (4, 8):
        for symmetric in (True, False):
            for group in (32, 64, 128, -1):
                name = "per-channel" if group == -1 else f"g{group}"
                layout = f"int{bits} {'sym' if symmetric else 'asym'} {name}"
                for method, label in (("absmax", "RTN"), ("search", OURS)):
                    config = HfQuantConfig(
                        bits=bits, symmetric=symmetric, group_size=group, method=method, kernel="reference"
                    )
                    found.append(Row(layout, label, config, method == "absmax"))
                if layout == "int8 sym per-channel":
                    found.append(Row(layout, "LLM.int8", BitsAndBytesConfig(load_in_8bit=True), True))
    for grid in ("nf4", "fp4"):
        for nested in (False, True):
            layout = f"{grid} g64{' dq' if nested else ''}"
            stock = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=grid,
                bnb_4bit_use_double_quant=nested,
                bnb_4bit_compute_dtype=torch.float32,
            )
            found.append(Row(layout, "bitsandbytes", stock, True))
            ours = HfQuantConfig(grid=grid, group_size=64, double_quant=nested, kernel="reference")
            found.append(Row(layout, OURS, ours, False))
    return found


def quantized(model: Path, row: Row) -> tuple[Any, float]:
    """The model of a row, with its weights expanded to float32 where it only quantizes weights, and its stored bits."""
    loaded = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=row.config, dtype=torch.float32, device_map={"": "cpu"}
    ).eval()
    bits = stored_bits(loaded)
    if row.method != "LLM.int8":
        loaded = loaded.dequantize().to(torch.float32)
    return loaded, bits


def stored_bits(model: torch.nn.Module) -> float:
    """Bits per quantized weight: codes, scales and zero points."""
    bits = weights = 0.0
    modules: list[Any] = list(model.modules())
    for module in modules:
        kind = type(module).__name__
        if kind not in ("QuantLinear", "Linear4bit", "Linear8bitLt"):
            continue
        count = module.in_features * module.out_features
        if kind == "QuantLinear":
            bits += count * module.scheme.bits_per_weight(module.in_features)
        elif kind == "Linear8bitLt":
            bits += 8 * count + 32 * module.out_features
        else:
            state = module.weight.quant_state
            bits += 8 * (module.weight.numel() + state.absmax.numel() * state.absmax.element_size())
            if state.nested:
                bits += 32 * state.state2.absmax.numel()
        weights += count
    return bits / weights


def compare_with_baselines(table: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Adds ``change`` to our rows: per text, in percent, KL against that of the best baseline of the same layout."""
    for row in table:
        rivals = [other for other in table if other["layout"] == row["layout"] and other["baseline"]]
        if row["method"] != OURS or not rivals:
            continue
        row["change"] = {}
        for name, figures in row["texts"].items():
            best = min((rival["texts"][name] for rival in rivals), key=lambda text: text["kl"]["value"])
            windows = [np.asarray(text["kl_of_windows"]) for text in (figures, best)]
            bootstrap = Bootstrap(len(windows[0]), BOOTSTRAP_SAMPLES, seed)
            interval = bootstrap.interval(*windows, statistic=lambda ours, theirs: 100 * (ours / theirs - 1))
            row["change"][name] = interval.model_dump()
    return table


def is_tie(change: dict[str, float]) -> bool:
    """Below 2 %, or not to be told from zero."""
    return abs(change["value"]) < TIE or change["low"] <= 0 <= change["high"]


def verdict(change: dict[str, float]) -> str:
    """``-28 %``, or ``tie`` with what was measured."""
    return f"tie ({change['value']:+.0f} %)" if is_tie(change) else f"{change['value']:+.0f} %"


def full_table(data: dict[str, Any]) -> list[str]:
    """Markdown of every row."""
    names = data["texts"]
    header = ["layout", "method", "bits per weight"]
    header += [f"KL {n}" for n in names] + [f"perplexity {n}" for n in names] + [f"top-1 {n}" for n in names]
    header += ["KL against the baseline"]
    floats = data["rows"][0]["texts"]
    body = [
        [
            "float32",
            "",
            "32",
            *("" for _ in names),
            *_perplexities(floats, "perplexity_float"),
            *("" for _ in names),
            "",
        ]
    ]
    for row in data["rows"]:
        kl = [f"{row['texts'][n]['kl']['value']:.3g}" for n in names]
        agree = [f"{100 * row['texts'][n]['top1_agreement']['value']:.1f} %" for n in names]
        change = " / ".join(verdict(value) for value in row.get("change", {}).values())
        bits = f"{row['bits_per_weight']:.2f}" if row["bits_per_weight"] else ""
        method = f"**{OURS}**" if row["method"] == OURS else row["method"]
        body.append([row["layout"], method, bits, *kl, *_perplexities(row["texts"], "perplexity"), *agree, change])
    return [*markdown_table(header, body), "", *_notes(data)]


def short_table(data: dict[str, Any]) -> list[str]:
    """Markdown for the README: a few layouts, baseline and ours side by side."""
    names = data["texts"]
    header = ["stored as", "bits per weight", f"KL {' / '.join(names)}: baseline", "hf-quant", "change"]
    body = []
    for layout in _SHORT:
        found = [row for row in data["rows"] if row["layout"] == layout]
        ours = next((row for row in found if "change" in row), None)
        rivals = [row for row in found if row["baseline"]]
        if ours is None:
            continue
        best = min(rivals, key=lambda row: sum(row["texts"][n]["kl"]["value"] for n in names))
        kl = [" / ".join(f"{row['texts'][n]['kl']['value']:.2g}" for n in names) for row in (best, ours)]
        change = " / ".join(verdict(value) for value in ours["change"].values())
        body.append([layout, f"{ours['bits_per_weight']:.2f}", f"{kl[0]} ({best['method']})", f"**{kl[1]}**", change])
    return [*markdown_table(header, body), "", *_notes(data)]


def _perplexities(texts: dict[str, Any], key: str) -> list[str]:
    return [f"{figures[key]['value']:.2f}" for figures in texts.values()]


def _notes(data: dict[str, Any]) -> list[str]:
    floor = next((row for row in data["rows"] if row["layout"] == "bfloat16"), None)
    between = " / ".join(f"{floor['texts'][n]['kl']['value']:.1g}" for n in data["texts"]) if floor else "not measured"
    return [
        f"{data['model']}, data-free; KL(float ‖ quantized) in nats per token on {' / '.join(data['texts'])}, "
        f"{data['windows']} × {data['length']} tokens each; noise floor (the float model in bfloat16) {between}; "
        f"changes below {TIE:.0f} % or whose 95 % interval holds zero are ties.",
    ]


def run(arguments: argparse.Namespace, label: str) -> dict[str, Any]:
    """Measure every row that the JSON file lacks."""
    model: Path = arguments.model
    protocol = {
        "model": label,
        "texts": list(BUILT_IN),
        "windows": arguments.windows,
        "length": arguments.length,
        "seed": arguments.seed,
        "hf_quant": hf_quant.__version__,
    }
    done = recorded(arguments.json, protocol)
    wanted = [row for row in rows() if re.search(arguments.only, row.key)]
    tokenizer = AutoTokenizer.from_pretrained(model)
    cuts = built_in_windows(tokenizer, arguments.windows, arguments.length, arguments.seed)
    data = {
        **protocol,
        "digests": {name: cut.text.sha256 for name, cut in cuts.items()},
        "environment": environment.describe().model_dump(),
    }

    def table() -> list[dict[str, Any]]:
        order = ["bfloat16 | float", *(row.key for row in rows())]
        return compare_with_baselines(sorted(done.values(), key=lambda row: order.index(row["key"])), arguments.seed)

    current = {row.key: row.code for row in rows()}
    done = {key: row for key, row in done.items() if row["code"] == current.get(key, row["code"])}
    missing = [row for row in wanted if row.key not in done]
    steps = arguments.windows * len(cuts)
    with Stages(not arguments.quiet) as stages, quiet_loading():
        if missing or "bfloat16 | float" not in done:
            with stages.stage("float model", steps) as advance:
                references = float_answers(model, cuts, advance)
        if "bfloat16 | float" not in done:
            narrow = float_model(model, torch.bfloat16)
            with stages.stage("noise floor (bfloat16)", steps) as advance:
                texts = measure(references, LogitStream(narrow, "bfloat16"), arguments.seed, advance)
            done["bfloat16 | float"] = {
                "key": "bfloat16 | float",
                "layout": "bfloat16",
                "method": "float",
                "baseline": False,
                "code": f"torch {torch.__version__}",
                "bits_per_weight": 16.0,
                "texts": texts,
            }
            del narrow
        for number, row in enumerate(missing, 1):
            with stages.stage(f"{number}/{len(missing)} {row.key}", steps) as advance:
                candidate, bits = quantized(model, row)
                texts = measure(references, LogitStream(candidate, row.key), arguments.seed, advance)
            done[row.key] = {
                "key": row.key,
                "layout": row.layout,
                "method": row.method,
                "baseline": row.baseline,
                "code": row.code,
                "bits_per_weight": bits,
                "texts": texts,
            }
            del candidate
            gc.collect()
            record(arguments.json, {**data, "rows": table()})
    return {**data, "rows": table()}


def main() -> None:
    """Measure, print, write, and say whether any row of ours lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a float model (default: the demo's SmolLM2)")
    parser.add_argument("--label", help="how the table calls the model")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="measure only rows whose 'layout | method' matches this regex")
    parser.add_argument("--json", type=Path, help="write the figures here after every row, and go on from there")
    parser.add_argument("--markdown", type=Path, help="write the whole table here")
    parser.add_argument("--fill", type=Path, help="write the short table between the marks of this Markdown file")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # one warning per layer and window otherwise
    hf_quant.disable()  # the rows of bitsandbytes run on stock transformers
    label = arguments.label or label_of(arguments.model)
    arguments.model = arguments.model or default_model()
    start = time.perf_counter()
    data = run(arguments, label)
    publish(full_table(data), arguments.markdown, arguments.fill, _MARKS, short_table(data))
    lost = [
        row["key"]
        for row in data["rows"]
        if any(v["value"] > 0 and not is_tie(v) for v in row.get("change", {}).values())
    ]
    print(
        f"\n{len(data['rows'])} rows in {time.perf_counter() - start:.0f} s; "
        + ("PASS" if not lost else f"LOST: {lost}")
    )
    sys.exit(LOST if lost else 0)


if __name__ == "__main__":
    main()
