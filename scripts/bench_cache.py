"""The reference cache's estimate of the divergence beside that of all logits: one row per checkpoint and text.

usage: python scripts/bench_cache.py DIR [DIR ...] [--reference MODEL] [--windows 16] [--length 512] [--fill README.md]

Any directories that transformers loads. Seconds are those of the comparison alone (models loaded before), one run each.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import (  # type: ignore[import-not-found]
    built_in_windows,
    default_model,
    float_model,
    label_of,
    publish,
)
from transformers import AutoTokenizer

from hf_quant.evaluation.compressed import DRAWN, KEPT, Compressed, compare_compressed, compress
from hf_quant.evaluation.divergence import compare, run_reference
from hf_quant.evaluation.stream import LogitStream
from hf_quant.evaluation.table import markdown_table

_MARKS = ("<!-- table:cache -->", "<!-- /table:cache -->")
_HEADER = [
    "checkpoint",
    "text",
    "KL, all logits",
    "KL, from the cache",
    "stated error (95 %)",
    "actual",
    "p99",
    "seconds",
]


def _rows(name: str, model: Any, references: dict[str, Any], kept: dict[str, Compressed]) -> list[list[str]]:
    stream = LogitStream(model, name)
    rows = []
    for text, reference in references.items():
        start = time.perf_counter()
        exact = compare(reference, stream)
        between = time.perf_counter()
        estimated = compare_compressed(kept[text], stream)
        seconds = between - start, time.perf_counter() - between
        assert estimated.kl_error is not None
        assert np.array_equal(exact.agree, estimated.agree)
        assert np.array_equal(exact.nll_model, estimated.nll_model)
        truth, found = exact.kl.mean(), estimated.kl.mean()
        rows.append(
            [
                name,
                text,
                f"{truth:.5f}",
                f"{found:.5f}",
                f"± {estimated.kl_error:.5f} ({100 * estimated.kl_error / truth:.2f} %)",
                f"{found - truth:+.5f} ({100 * (found - truth) / truth:+.2f} %)",
                f"{exact.kl_p99:.4g} → {estimated.kl_p99:.4g}",
                f"{seconds[0]:.1f} → {seconds[1]:.1f}",
            ]
        )
        name = ""
    return rows


def main() -> None:
    """Compress once, compare every checkpoint both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--reference", type=Path, help="the float model (default: the demo's SmolLM2)")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fill", type=Path, help="write the table between the marks of this Markdown file")
    arguments = parser.parse_args()
    model = arguments.reference or default_model()
    cuts = built_in_windows(AutoTokenizer.from_pretrained(model), arguments.windows, arguments.length, arguments.seed)
    stream = LogitStream(float_model(model), "float")
    references = {name: run_reference(stream, cut.ids) for name, cut in cuts.items()}
    kept = {name: compress(reference, arguments.seed) for name, reference in references.items()}
    rows = []
    for directory in arguments.directories:
        rows += _rows(directory.resolve().name, float_model(directory), references, kept)
    one = next(iter(kept.values()))
    position = (
        sum(getattr(one, field).nbytes for field in ("tokens", "log_p", "log_tail", "top", "nll")) / one.nll.numel()
    )
    note = (
        f"{label_of(arguments.reference)}, {arguments.windows} windows of {arguments.length} tokens per text, float32; "
        f"{KEPT} tokens kept and {DRAWN} drawn: {position:,.0f} bytes per position, all logits in float32 are "
        f"{4 * one.vocabulary:,}. Perplexities and agreement are the same both ways."
    )
    publish([*markdown_table(_HEADER, rows), "", note], None, arguments.fill, _MARKS)


if __name__ == "__main__":
    main()
