"""A tiny checkpoint with results, card and plots, made once; every test gets a copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.card import write_card
from hf_quant.evaluation import evaluate_directory


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that the tiny tokenizer knows well."""
    path = tmp_path_factory.mktemp("text") / "fox"
    path.write_text("the quick brown fox jumps over the lazy dog because it can " * 200, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def float_model(tiny_checkpoint: Callable[..., Path]) -> Path:
    """What the checkpoint was made from; read only."""
    return tiny_checkpoint("llama", dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def published(float_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint itself; read only."""
    directory = tmp_path_factory.mktemp("published") / "tiny-int4"
    hf_quant.quantize(str(float_model), HfQuantConfig(bits=4, group_size=32), directory)
    options: dict[str, Any] = {"windows": 4, "length": 32, "repeats": 1, "progress": False}
    evaluate_directory(directory, str(float_model), texts=(str(text),), **options)
    write_card(directory, base_model="org/base", quantized_by="tester")
    return directory


@pytest.fixture
def checkpoint(published: Path, tmp_path: Path) -> Path:
    """A copy that may be changed, under another name."""
    return Path(shutil.copytree(published, tmp_path / "copy"))


@pytest.fixture(scope="session")
def edit() -> Callable[[Path, Callable[[Any], None]], None]:
    """``edit(path, change)``: change a JSON file in place."""

    def run(path: Path, change: Callable[[Any], None]) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    return run
