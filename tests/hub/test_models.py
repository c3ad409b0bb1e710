"""``model.push_to_hub`` publishes what `hf-quant push` would: manifest, checks, a card that says what was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.card import write_card
from hf_quant.evaluation import evaluate_directory


@pytest.fixture(scope="module")
def measured(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny int4 checkpoint with results and card; read only."""
    folder = tmp_path_factory.mktemp("measured")
    source = tiny_checkpoint("llama", dtype=torch.bfloat16)
    hf_quant.quantize(str(source), HfQuantConfig(bits=4, group_size=32), folder / "tiny")
    (folder / "fox").write_text("the quick brown fox jumps over the lazy dog because it can " * 200)
    options: dict[str, Any] = {"windows": 4, "length": 32, "speed": False, "progress": False}
    evaluate_directory(folder / "tiny", str(source), texts=(str(folder / "fox"),), **options)
    write_card(folder / "tiny", base_model="org/base")
    return folder / "tiny"


def _text(world: Any, name: str) -> str:
    return str(world.served()[name].decode())


def test_a_model_gives_the_card_of_its_directory(world: Any, measured: Path) -> None:
    arguments: dict[str, Any] = {"token": world.write_token, "base_model": "org/base"}
    report = world.call("push_model", directory=str(measured), repo_id="tester/tiny", **arguments)
    assert report["created"] and report["commit"] == world.hub.repos["tester/tiny"].at()
    served = world.served()
    directory = {p.relative_to(measured).as_posix() for p in measured.rglob("*") if p.is_file()}
    assert set(served) == directory
    from_directory = (measured / "README.md").read_text()
    assert from_directory.count("tester/tiny") == 0
    assert _text(world, "README.md") == from_directory.replace('"tiny"', '"tester/tiny"').replace(
        "vllm serve tiny\n", "vllm serve tester/tiny\n"
    )
    again = world.call("push_model", directory=str(measured), repo_id="tester/tiny", **arguments)
    assert not again["created"] and again["commit"] == report["commit"]
    verified = world.call("verify", source="tester/tiny", token=world.write_token)
    assert verified["ok"] and not verified["findings"], verified["findings"]
    assert verified["commit"] == report["commit"] and set(verified["done"]) == {"files", "plan", "results", "card"}


def test_a_model_that_was_quantized_while_loading(world: Any, tiny_llama: Path) -> None:
    arguments: dict[str, Any] = {"token": world.write_token, "private": True, "tags": ["mine"], "create_pr": True}
    report = world.call("push_quantized", directory=str(tiny_llama), repo_id="tester/tiny", **arguments)
    assert report["pull_request"] and world.hub.repos["tester/tiny"].private
    served = world.served(revision="refs/pr/1")
    card = served["README.md"].decode()
    assert "- mine\n" in card and "- hf-quant\n" in card and "Not measured." in card
    assert "tokenizer.json" in served, "the files beside the float model travel along"


def test_float_models_keep_the_push_of_transformers(world: Any, tiny_llama: Path) -> None:
    world.call("push_quantized", directory=str(tiny_llama), repo_id="tester/other", token=world.write_token)
    world.call("push_float", directory=str(tiny_llama), repo_id="tester/tiny", token=world.write_token)
    assert "hf_quant.json" not in world.served() and "README.md" in world.served()


def test_verify_of_a_tampered_repository_names_the_file(world: Any, measured: Path) -> None:
    world.push(measured, token=world.write_token)
    repo = world.hub.repos["tester/tiny"]
    files = dict(repo.files())
    content = bytearray(files["model.safetensors"].content)
    content[-1] ^= 1
    repo.commit("main", {**files, "model.safetensors": world.Blob(bytes(content), True)})
    found = world.call("verify", source="tester/tiny", token=world.write_token)
    assert not found["ok"] and found["findings"][0]["subject"] == "model.safetensors"
    assert "(tensor " in found["findings"][0]["problem"]
