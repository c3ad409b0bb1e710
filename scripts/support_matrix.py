"""The support matrix: every architecture of the conformance suite from end to end, as a table for the README.

    python scripts/support_matrix.py --fill README.md

Models are tiny, with random weights, on the CPU: the table says what works and what is quantized, not how accurate or
fast it is.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import transformers
from measuring import publish  # type: ignore[import-not-found]

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "conformance"))
from architectures import CASES, Architecture  # type: ignore[import-not-found]
from trial import Outcome, run  # type: ignore[import-not-found]

MARKS = ("<!-- table:support -->", "<!-- /table:support -->")
HEADER = (
    "| model | linear layers | quantized share | in float, share of the parameters | stock transformers |",
    "|---|--:|--:|---|---|",
)
SHORT = {  # how the reasons of a plan are called in the table; what is not here is shown as the plan has it
    "embeddings stay in float unless an override names them": "embeddings",
    "output head": "output head",
    "last layer of the model (its head)": "last layer",
    "biases stay in float": "biases and norms",
    "vectors (norms, gains) stay in float": "biases and norms",
    "left in float on request": "by choice",
    "not a linear layer": "no linear layer",
    "a subclass of nn.Linear: its weight may be read without calling it": "read without being called",
}


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fill", type=Path, help="a Markdown file with marks for the table")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, too")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.getLogger("hf_quant").setLevel(logging.ERROR)
    publish(list(table()), options.markdown, options.fill, MARKS)


def table() -> Iterator[str]:
    """Markdown lines."""
    yield from HEADER
    family = ""
    for case in CASES:
        if case.family != family:
            family = case.family
            yield f"| **{family}** | | | | |"
        with tempfile.TemporaryDirectory(prefix="hf-quant-matrix-") as directory:
            yield row(case, run(case, Path(directory)))


def row(case: Architecture, found: Outcome) -> str:
    """One line; what did not hold is said in its first cell."""
    wrong = [
        name
        for name, holds in {
            "planned and made differ": found.plan.quantized == found.made.quantized,
            "outputs are off": found.error < 1e-5,
            "reloading changes it": found.reloaded == 0 and found.tokens is not False,
            "dequantizing changes more than weights": found.keys and not found.kept,
        }.items()
        if not holds
    ]
    total = sum(layer.numel for layer in found.plan.layers if not layer.note.startswith("tied to"))
    shares: dict[str, int] = defaultdict(int)
    for layer in found.plan.kept:
        if not layer.note.startswith("tied to"):
            shares[_reason(layer.kind, layer.note)] += layer.numel
    kept = ", ".join(f"{why} {size / total:.1%}" for why, size in sorted(shares.items(), key=lambda item: -item[1]))
    label = f"{case.name}: {'; '.join(wrong)}" if wrong else case.name
    grid = f" ({case.config['grid']}: {case.why})" if "grid" in case.config else ""
    return f"| {label}{grid} | {len(found.plan.quantized)} | {found.share:.0%} | {kept} | {_stock(found.stock)} |"


def _reason(kind: str, note: str) -> str:
    short = SHORT.get(note, note)
    return f"{kind} ({short})" if short == "no linear layer" else short


def _stock(found: str) -> str:
    works, _, how = found.partition(" with ")
    if works in ("exact", "loads"):
        return f"yes, with `{how}`" if how else "yes"
    return "no: random experts" if "random" in found else "no: its loader fails"


if __name__ == "__main__":
    main()
