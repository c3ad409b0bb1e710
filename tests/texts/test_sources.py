"""Texts: what is held out stays held out, what cannot be read is named; files and Hub datasets."""

from __future__ import annotations

import hashlib
import json
import sys

import pytest

from hf_quant.errors import CalibrationError, DependencyError, EvaluationError
from hf_quant.texts import load_text
from hf_quant.texts.hub import open_hub


@pytest.mark.parametrize("name", ["docs", "prose"])
def test_built_in_parts_are_disjoint_and_complete(name):
    whole, held_out, rest = (load_text(name, part).content for part in ("all", "evaluation", "calibration"))
    assert len(held_out) + len(rest) == len(whole)
    assert len(held_out) > 90_000 and len(rest) > 180_000
    # no paragraph of one part is in the other (short ones, such as headings, come again by their nature)
    long = [paragraph for paragraph in held_out.split("\n\n") if len(paragraph) > 100]
    assert len(long) > 100
    assert [paragraph for paragraph in long if paragraph in rest] == []


def test_prose_has_no_header_and_is_what_we_ship():
    text = load_text("prose", "all")
    assert text.content.startswith("NORTHANGER ABBEY")
    assert "#" not in text.content and "licence" not in text.content
    assert text.sha256 == "c4249d4dabd08b91f04fc1325ddb47b3930d59c9e71a3a0b26f429ff22a91bdf"


def test_docs_names_the_python_it_comes_from():
    text = load_text("docs")
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in text.source
    assert text.sha256 == hashlib.sha256(text.content.encode()).hexdigest()
    assert load_text("docs") == text


def test_user_files(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("Grüße, 世界\n", encoding="utf-8")
    text = load_text(file)
    assert (text.name, text.content) == ("notes.txt", "Grüße, 世界\n")
    assert str(tmp_path) not in text.source
    with pytest.raises(EvaluationError, match="cannot read"):
        load_text(tmp_path / "absent.txt")
    with pytest.raises(EvaluationError, match="cannot read"):
        load_text(tmp_path)
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(EvaluationError, match="not UTF-8"):
        load_text(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(EvaluationError, match="empty"):
        load_text(tmp_path / "empty.txt")


def test_hub_dataset_without_datasets_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match="`datasets`"):
        load_text("hub:org/name")


def test_hub_dataset_from_a_local_repository(tmp_path):
    """`datasets` reads a directory of data files exactly as it reads a dataset repository."""
    pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    repository = tmp_path / "notes"
    repository.mkdir()
    for split in ("train", "test"):
        rows = [{"text": f"{split} text {i}", "title": f"{split} title {i}", "size": i} for i in range(3)]
        (repository / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_text(f"hub:{repository}").content == "test text 0\n\ntest text 1\n\ntest text 2"
    named = load_text(f"hub:{repository}:train:title")
    assert named.content.startswith("train title 0\n\n")
    assert named.name == "notes" and "split train, column title" in named.source
    with pytest.raises(EvaluationError, match="no column 'body'"):
        load_text(f"hub:{repository}:test:body")
    with pytest.raises(EvaluationError, match="is not text"):
        load_text(f"hub:{repository}:test:size")
    with pytest.raises(EvaluationError, match="cannot load dataset"):
        load_text(f"hub:{repository}:validation")
    with pytest.raises(EvaluationError, match="cannot load dataset"):
        load_text(f"hub:{tmp_path / 'absent'}")


def test_a_text_that_cannot_be_read_is_the_error_of_whoever_asked(tmp_path):
    for kind in (CalibrationError, EvaluationError):
        with pytest.raises(kind, match="cannot read"):
            load_text(tmp_path / "absent.txt")


def test_the_forms_of_a_dataset_name(tmp_path):
    pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    repository = tmp_path / "notes"
    repository.mkdir()
    (repository / "train.jsonl").write_text(json.dumps({"body": "words"}) + "\n")
    for spec in ("@default:train:body", ":default:train:body", "::body"):
        opened = open_hub(f"hub:{repository}{spec}", "train")
        assert (opened.split, opened.column, opened.columns) == ("train", "body", ("body",))
        assert list(opened.rows) == [{"body": "words"}]
    with pytest.raises(EvaluationError, match="does not name a Hub dataset"):
        open_hub("hub:", "train")
    with pytest.raises(EvaluationError, match="does not name a Hub dataset"):
        open_hub(f"hub:{repository}@default:a:b:c", "train")


def test_a_dataset_that_is_not_on_disk_says_that_it_is_offline():
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    assert datasets.config.HF_HUB_OFFLINE
    with pytest.raises(EvaluationError, match="cannot load dataset 'org/absent'") as caught:
        load_text("hub:org/absent")
    assert "HF_HUB_OFFLINE" in caught.value.fix
