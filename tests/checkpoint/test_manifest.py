"""The manifest: it records every file, notices every change, and is itself read strictly."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_quant.checkpoint import (
    atomic_directory,
    checkpoint_digest,
    copy_side_files,
    file_sha256,
    read_manifest,
    require_verified,
    verify_manifest,
    write_manifest,
)
from hf_quant.checkpoint.contents import belongs, foreign_files, is_ours, list_files
from hf_quant.errors import CheckpointError

PROVENANCE = {"version": "0.1", "format": "compressed-tensors", "recipe": {"bits": 4}, "data": None}
PLAN = [{"name": "model.layers.0.mlp.up_proj", "shape": (128, 64), "scheme": None, "note": "ünïcode"}]


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint with a manifest, and all that is not recorded in it."""
    directory = Path(shutil.copytree(tiny_checkpoint("llama", shard="200KB"), tmp_path / "checkpoint"))
    write_manifest(directory, PROVENANCE, PLAN)
    for name in ("README.md", "evaluation.json", "plots/kl.png", ".gitattributes", ".cache/huggingface/x.metadata"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("later")
    return directory


def test_what_is_written_is_read(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert manifest.provenance == PROVENANCE
    assert manifest.plan == [{**PLAN[0], "shape": [128, 64]}]
    assert set(manifest.files) == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("model.safetensors.index.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))),
    }
    for name, entry in manifest.files.items():
        content = (checkpoint / name).read_bytes()
        assert (entry.sha256, entry.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert json.loads((checkpoint / "hf_quant.json").read_text())["schema_version"] == 1


def test_what_may_change_later_is_not_recorded(checkpoint: Path) -> None:
    result = verify_manifest(checkpoint)
    assert result.ok and str(result) == "every file is as recorded"
    (checkpoint / "README.md").write_text("even later")
    assert require_verified(checkpoint) == read_manifest(checkpoint)


def test_every_change_is_named(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "config.json").write_text("{}")
    shard = checkpoint / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1  # the same size
    shard.write_bytes(content)
    (checkpoint / "extra.txt").write_text("")
    (checkpoint / "plots" / "data.csv").write_text("")
    result = verify_manifest(checkpoint)
    assert result.missing == ("tokenizer.json",)
    assert result.changed == ("config.json", "model-00002-of-00003.safetensors")
    assert result.unexpected == ("extra.txt", "plots/data.csv")
    with pytest.raises(CheckpointError) as caught:
        require_verified(checkpoint)
    for name in (*result.missing, *result.changed, *result.unexpected):
        assert name in str(caught.value)


def test_the_digest_names_the_content(checkpoint: Path, tmp_path: Path) -> None:
    digest = checkpoint_digest(checkpoint)
    assert len(digest) == 64
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    write_manifest(copy, {"another": "provenance"})
    assert checkpoint_digest(copy) == digest
    (copy / "chat_template.jinja").write_text("{{ other }}")
    write_manifest(copy, PROVENANCE, PLAN)
    changed = checkpoint_digest(copy)
    assert changed != digest
    (copy / "chat_template.jinja").rename(copy / "chat_template.json")
    write_manifest(copy, PROVENANCE, PLAN)
    assert checkpoint_digest(copy) not in (digest, changed), "names count as well"


def test_progress_reaches_the_total(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_manifest(checkpoint, PROVENANCE, progress=lambda done, total: seen.append((done, total)))
    total = sum(entry.bytes for entry in read_manifest(checkpoint).files.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_large_files_are_read_in_pieces(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000
    (tmp_path / "large").write_bytes(content)
    pieces: list[int] = []
    assert file_sha256(tmp_path / "large", pieces.append) == hashlib.sha256(content).hexdigest()
    assert len(pieces) > 1 and sum(pieces) == len(content)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object(), b"bytes"])
def test_values_that_json_cannot_hold(checkpoint: Path, value: Any) -> None:
    before = (checkpoint / "hf_quant.json").read_bytes()
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        write_manifest(checkpoint, {"value": value})
    assert (checkpoint / "hf_quant.json").read_bytes() == before


def test_a_checkpoint_without_manifest(checkpoint: Path) -> None:
    (checkpoint / "hf_quant.json").unlink()
    for function in (read_manifest, verify_manifest, require_verified, checkpoint_digest):
        with pytest.raises(CheckpointError, match=r"has no hf_quant\.json"):
            function(checkpoint)


ENTRY = {"sha256": "0" * 64, "bytes": 1}
GOOD: dict[str, Any] = {"schema_version": 1, "files": {"a": ENTRY}, "provenance": {}, "plan": []}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"schema_version": "1"}, "schema_version"),
        ({"more": 1}, "more"),
        ({"files": []}, "files"),
        ({"files": {"a": {**ENTRY, "sha256": "0" * 63}}}, r"files\.a\.sha256"),
        ({"files": {"a": {**ENTRY, "sha256": "G" * 64}}}, r"files\.a\.sha256"),
        ({"files": {"a": {**ENTRY, "bytes": -1}}}, r"files\.a\.bytes"),
        ({"files": {"a": {**ENTRY, "bytes": "1"}}}, r"files\.a\.bytes"),
        ({"files": {"a": {**ENTRY, "md5": ""}}}, r"files\.a\.md5"),
        ({"files": {"a": {"bytes": 1}}}, r"files\.a\.sha256"),
        ({"provenance": None}, "provenance"),
        ({"plan": [1]}, r"plan\.0"),
    ],
)
def test_malformed_manifests(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    (tmp_path / "hf_quant.json").write_text(json.dumps(GOOD))
    assert read_manifest(tmp_path).files["a"].bytes == 1
    (tmp_path / "hf_quant.json").write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(CheckpointError, match=f"is not a manifest of schema 1: {match}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1, "a": 2}'])
def test_manifests_that_are_no_json_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "hf_quant.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"hf_quant\.json"):
        read_manifest(tmp_path)


def test_links_out_of_the_directory_are_not_hashed(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("mine")
    (checkpoint / "LICENSE").symlink_to(tmp_path / "private")
    assert verify_manifest(checkpoint).unexpected == ("LICENSE",)
    with pytest.raises(CheckpointError, match=r"LICENSE is a link to .*outside"):
        write_manifest(checkpoint, {})
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.json").symlink_to(tmp_path / "private")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link to .*outside"):
        verify_manifest(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "LICENSE").unlink()
    (tmp_path / "folder").mkdir()
    (checkpoint / "extra").symlink_to(tmp_path / "folder")
    assert verify_manifest(checkpoint).unexpected == ("extra",)


SIDE_FILES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "merges.txt",
        "vocab.json",
    ),
    *("qwen.tiktoken", "generation_config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "LICENSE", "NOTICE"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
)
NEVER = (
    *("model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "config.json", "README.md"),
    *("hf_quant.json", "evaluation.json", ".env", "token", "id_rsa", "train.sh", "sub/tokenizer.json", "optimizer.pt"),
    *("1_Pooling/pytorch_model.bin", "1_Pooling/x.py", "sub/model.safetensors"),
)


def test_side_files_are_copied_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    for name in (*SIDE_FILES, *NEVER, "modeling_x.py", "sub/evil.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (target / "tokenizer.json").write_text("saved by the caller")
    copied = copy_side_files(source, target)
    assert sorted(copied) == sorted(set(SIDE_FILES) - {"tokenizer.json"})
    assert sorted(list_files(target)) == sorted(SIDE_FILES)
    assert (target / "tokenizer.json").read_text() == "saved by the caller"
    assert copy_side_files(source, target, code=True) == ["modeling_x.py"]


def test_links_to_secrets_are_not_copied(tmp_path: Path) -> None:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "id_rsa").write_text("secret")
    (tmp_path / "source" / "tokenizer.json").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(CheckpointError, match="outside the checkpoint directory"):
        copy_side_files(tmp_path / "source", tmp_path / "target")
    assert not any((tmp_path / "target").iterdir())


def test_what_belongs_to_a_checkpoint(checkpoint: Path) -> None:
    assert foreign_files(checkpoint) == [] and is_ours(checkpoint)
    for name in (*SIDE_FILES, "config.json", "model.safetensors", "model-00001-of-00012.safetensors", "plots/kl.png"):
        assert belongs(name)
    for name in (
        "x.safetensors",
        "model.bin",
        "train.py",
        "plots/data.csv",
        "sub/config.json",
        "xtokenizer.json",
        ".env",
    ):
        assert not belongs(name)
    (checkpoint / "model.py").write_text("")
    assert foreign_files(checkpoint) == [], "code may be part of a checkpoint with a manifest"
    (checkpoint / "hf_quant.json").unlink()
    assert foreign_files(checkpoint) == ["model.py"] and not is_ours(checkpoint)
    (checkpoint / "config.json").write_text("not json")
    assert not is_ours(checkpoint)


def test_a_checkpoint_is_made_as_the_tool_makes_it(tiny_llama: Path, tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as temporary:
        for name in ("config.json", "model.safetensors"):
            shutil.copy(tiny_llama / name, temporary / name)
        copy_side_files(tiny_llama, temporary)
        write_manifest(temporary, PROVENANCE)
    assert verify_manifest(tmp_path / "out").ok
