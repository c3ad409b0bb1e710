"""Every architecture of the support matrix: what is planned is done, computed exactly, saved and found again."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
architectures, trial = importlib.import_module("architectures"), importlib.import_module("trial")
sys.path.pop(0)

# why a row of the matrix may have parameters of two or more dimensions in float
REASONS = (
    "embeddings stay in float",
    "output head",
    "last layer of the model",
    "tied to",
    "left in float on request",
    "not a linear layer",  # convolutions, positions, routers, class tokens
    "a subclass of nn.Linear",  # a router of Llama 4, an attention of torch
    "the model keeps it in float32",
    "biases stay in float",  # of experts
)


@pytest.fixture(params=architectures.CASES, ids=lambda case: case.model_type)
def case(request: pytest.FixtureRequest) -> Iterator[object]:
    """One architecture."""
    yield request.param


def test_from_end_to_end(case, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = trial.run(case, tmp_path)
    # the plan of the files is that of the model, and all of it was done
    assert [(q.name, q.scheme) for q in found.plan.layers] == [(q.name, q.scheme) for q in found.made.layers]
    # quantizing moves the output; our kernels compute what the dequantized float model computes
    assert found.moved > 100 * found.error and found.error < 1e-5
    assert found.reloaded == 0 and found.tokens is not False
    # what comes back is a float model like the one before: same parameters, vectors untouched, weights off by 4 bits
    assert found.keys and found.kept == () and 0.05 < found.weights < 0.15
    assert found.share > 0.35
    unexplained = [q.name for q in found.plan.kept if len(q.shape) > 1 and not q.note.startswith(REASONS)]
    assert unexplained == []
    request.getfixturevalue("stock_as_known")
    # the sentence in the card is true
    promised = "cannot" if "Stock transformers cannot" in found.promised else "loads"
    works = found.stock.split(" with ")[0] in ("exact", "loads")
    assert works == (promised == "loads"), (found.stock, found.promised)
    if works:
        assert ("dequantize=True" in found.stock) == ("dequantize=True)" in found.promised), found.promised


def test_the_matrix_covers_the_families() -> None:
    kinds = [case.model_type for case in architectures.CASES]
    assert len(set(kinds)) == len(kinds) >= 25
