"""Stock checkpoints that the tests of this folder share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("stock_files", Path(__file__).with_name("stock_files.py"))
assert _SPEC is not None and _SPEC.loader is not None
stock_files = importlib.util.module_from_spec(_SPEC)
sys.modules["stock_files"] = stock_files
_SPEC.loader.exec_module(stock_files)


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``stored(case, architecture)``: a stock checkpoint with its float twin beside it; read only."""
    made: dict[tuple[str, str], Path] = {}

    def make(case: str = "gptq", architecture: str = "llama") -> Path:
        if (case, architecture) not in made:
            made[case, architecture] = stock_files.write(
                tmp_path_factory.mktemp(case) / "packed", architecture, stock_files.CASES[case]
            )
        return made[case, architecture]

    return make
