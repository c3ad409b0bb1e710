"""Texts and windows: what is held out stays held out, what is too short says what fits."""

from __future__ import annotations

import copy
import hashlib
import json
import sys

import pytest
import torch
from tokenizers import processors

from hf_quant.errors import DependencyError, EvaluationError
from hf_quant.evaluation.text import Text, cut_windows, load_text


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


def test_windows_do_not_overlap_and_spread(tiny_tokenizer):
    text = load_text("prose")
    ids = tiny_tokenizer(text.content, verbose=False)["input_ids"]
    cut = cut_windows(text, tiny_tokenizer, 16, 128, seed=0)
    assert cut.ids.shape == (16, 128) and cut.ids.dtype == torch.int64 and not cut.bos
    tiles = len(ids) // 128
    places = []
    for row in cut.ids.tolist():
        found = [i for i in range(tiles) if ids[i * 128 : (i + 1) * 128] == row]
        assert len(found) == 1
        places += found
    assert places == sorted(set(places))
    assert all(tiles * i // 16 <= place < tiles * (i + 1) // 16 for i, place in enumerate(places))
    assert torch.equal(cut.ids, cut_windows(text, tiny_tokenizer, 16, 128, seed=0).ids)
    assert not torch.equal(cut.ids, cut_windows(text, tiny_tokenizer, 16, 128, seed=1).ids)


def test_windows_start_with_bos_where_the_tokenizer_adds_it(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    text = Text("t", "test", "many words and words " * 200)
    cut = cut_windows(text, tokenizer, 4, 32, seed=0)
    assert cut.bos and cut.ids.shape == (4, 32)
    assert (cut.ids[:, 0] == 1).all() and (cut.ids[:, 1:] != 1).all()


def test_too_short_says_how_many_windows_fit(tiny_tokenizer):
    text = Text("notes.txt", "test", "x" * 1000)
    tokens = len(tiny_tokenizer(text.content)["input_ids"])
    with pytest.raises(EvaluationError, match=rf"{tokens} tokens: {tokens // 100} windows of 100 fit") as caught:
        cut_windows(text, tiny_tokenizer, 64, 100, seed=0)
    assert f"windows={tokens // 100}" in caught.value.fix
    for count, length in ((1, 10), (4, 1)):
        with pytest.raises(EvaluationError):
            cut_windows(text, tiny_tokenizer, count, length, seed=0)


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
