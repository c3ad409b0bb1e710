"""Files for other runtimes are published like checkpoints and replace none unasked; verify asks the Hub itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.card import write_card
from hf_quant.convert import convert

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint ``int4`` and its ``gguf`` files, both with cards."""
    folder = tmp_path_factory.mktemp("made")
    hf_quant.quantize(str(tiny_llama), HfQuantConfig(bits=4, group_size=32), folder / "int4")
    convert(folder / "int4", folder / "gguf", "gguf")
    for name in ("int4", "gguf"):
        write_card(folder / name, allow_unmeasured=True)
    return folder


def test_a_gguf_file_arrives_whole_and_verifies(world: Any, made: Path) -> None:
    report = world.push(made / "gguf", "tester/tiny-gguf")
    assert "gguf-Q4_0.gguf" in report["uploaded"] and report["foreign"] == []
    files = {path.relative_to(made / "gguf").as_posix() for path in (made / "gguf").rglob("*") if path.is_file()}
    assert set(world.served("tester/tiny-gguf")) == files, "nothing else, and nothing is missing"
    card = world.served("tester/tiny-gguf")["README.md"].decode()
    assert "ollama run hf.co/tester/tiny-gguf" in card and "hf download tester/tiny-gguf gguf-Q4_0.gguf" in card
    assert world.call("verify", source="tester/tiny-gguf", token=world.write_token)["ok"]
    assert not world.push(made / "gguf", "tester/tiny-gguf")["created"]
    stray = made / "gguf" / "other.gguf"
    stray.write_bytes(b"GGUF")
    try:
        world.refused(made / "gguf", "other.gguf does not belong", repo_id="tester/tiny-gguf")
    finally:
        stray.unlink()


def test_neither_replaces_the_other_unasked(world: Any, made: Path) -> None:
    world.push(made / "int4", "tester/both")
    before = world.served("tester/both")
    world.refused(made / "gguf", r"same model in other files \(model.safetensors\)", repo_id="tester/both")
    assert world.served("tester/both") == before
    world.push(made / "gguf", "tester/both", overwrite=True)
    assert "model.safetensors" not in world.served("tester/both")
    world.refused(made / "int4", r"same model in other files \(gguf-Q4_0.gguf\)", repo_id="tester/both")


def test_verify_does_not_answer_from_the_cache(world: Any, made: Path) -> None:
    world.push(made / "int4", "tester/hidden", private=True)
    assert world.call("verify", source="tester/hidden", token=world.write_token)["ok"]
    with pytest.raises(Exception, match="the Hub does not give it") as caught:
        world.call("verify", source="tester/hidden", token="hf_nobody-s")
    assert caught.value.kind == "HubError"
