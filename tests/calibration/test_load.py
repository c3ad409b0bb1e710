"""Texts, chats and datasets to batches for decoders, encoders and encoder-decoders."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from tokenizers import processors
from transformers import BertConfig, BertModel, BertTokenizerFast, T5Config, T5ForConditionalGeneration

from hf_quant.calibration import from_texts, load_calibration
from hf_quant.calibration.needs import find_needs
from hf_quant.errors import CalibrationError, CheckpointError, DependencyError
from hf_quant.texts import load_text

CHAT = [{"role": "user", "content": "the quick fox"}, {"role": "assistant", "content": "jumps over the dog"}]


def _rows(data) -> list[list[int]]:
    return [row for batch in data.batches for row in batch["input_ids"].tolist()]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny BERT with a WordPiece tokenizer of letters."""
    path = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(path / "vocab.txt"), model_max_length=96).save_pretrained(path)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def t5(tmp_path_factory, tiny_tokenizer):
    """A tiny T5 whose tokenizer ends a text with </s>."""
    path = tmp_path_factory.mktemp("t5")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    tokenizer.save_pretrained(path)
    config = T5Config(
        vocab_size=384,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["docs", "prose"])
def test_built_in_texts_are_of_the_calibration_part(name, tiny_llama, tiny_tokenizer):
    options = {"directory": tiny_llama, "samples": 8, "length": 64, "batch_size": 3}
    data = load_calibration(name, **options)
    assert [len(batch["input_ids"]) for batch in data.batches] == [3, 3, 2]
    assert (data.source, data.samples, data.tokens) == (name, 8, 512)
    rest, held_out = (load_text(name, part).content for part in ("calibration", "evaluation"))
    for row in _rows(data):
        text = tiny_tokenizer.decode(row[2:-2]).strip("�")
        assert text in rest and text not in held_out
    if name == "docs":
        other = load_calibration(name, seed=1, **options)
        assert load_calibration(name, **options).sha256 == data.sha256 != other.sha256


def test_joined_sources_are_interleaved_in_equal_shares(tiny_llama):
    options = {"directory": tiny_llama, "length": 32}
    both = load_calibration("docs+prose", samples=5, **options)
    docs = load_calibration("docs", samples=3, **options)
    prose = load_calibration("prose", samples=2, **options)
    assert both.source == "docs+prose" and both.samples == 5
    assert _rows(both)[::2] == _rows(docs) and _rows(both)[1::2] == _rows(prose)
    mixed = load_calibration("self + docs", samples=4, **options)
    assert mixed.source == "self+docs" and mixed.tokens == 128
    with pytest.raises(CalibrationError, match="cannot be shared"):
        load_calibration("docs+prose", samples=1, **options)


def test_files(tmp_path, tiny_llama, tiny_tokenizer):
    options = {"directory": tiny_llama, "samples": 4, "length": 16}
    words = "the quick brown fox jumps over the lazy dog. "
    (tmp_path / "a+b.txt").write_text(words * 40)
    plain = load_calibration(f"file:{tmp_path / 'a+b.txt'}", **options)
    assert plain.source == "file:a+b.txt" and plain.samples == 4
    assert load_calibration(tmp_path / "a+b.txt", **options).sha256 == plain.sha256
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": words * 5, "id": i}) + "\n" for i in range(20)))
    rows = load_calibration(str(tmp_path / "rows.jsonl"), **options)
    assert rows.source == "file:rows.jsonl" and rows.samples == 4
    (tmp_path / "chats.json").write_text(json.dumps([{"messages": CHAT}] * 10))
    chats = load_calibration(str(tmp_path / "chats.json"), **{**options, "samples": 1000})
    rendered = tiny_tokenizer.apply_chat_template(CHAT, tokenize=False)
    stream = tiny_tokenizer(rendered * 10, add_special_tokens=False)["input_ids"]
    assert chats.samples == len(stream) // 16 < 1000
    assert [token for row in _rows(chats) for token in row] == stream[: chats.samples * 16]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("short.txt", "the fox", r"'file:short.txt' has \d+ tokens, one sequence of 64 needs 64"),
        ("empty.md", " \n", "empty"),
        ("broken.jsonl", '{"text": "a"}\n{"text"', "is not JSONL"),
        ("object.json", '{"text": "a"}', "not a list"),
        ("columns.jsonl", '{"text": "a"}\n{"body": "b", "n": 1}', "row 2 of columns.jsonl .* 'body', 'n'"),
        ("numbers.json", "[1, 2]", "row 1 of numbers.json"),
        ("roles.json", '[{"messages": [{"role": "user"}]}]', "row 1 of roles.json"),
    ],
)
def test_files_that_are_refused(tmp_path, tiny_llama, name, content, problem):
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=problem):
        load_calibration(f"file:{tmp_path / name}", directory=tiny_llama, samples=2, length=64)


def test_sources_that_are_refused(tmp_path, tiny_llama, tiny_model):
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    for source, problem in (
        ("wikitext", "no calibration source 'wikitext'"),
        (f"file:{tmp_path / 'absent.txt'}", "cannot read"),
        (f"file:{tmp_path / 'latin.txt'}", "not UTF-8"),
        (f"images:{tmp_path}", "reads text, it cannot be calibrated on images"),
        ([], "empty list"),
        ([3], "calibration text 0 is int"),
        (["", ""], "have no tokens"),
    ):
        with pytest.raises(CalibrationError, match=problem):
            load_calibration(source, directory=tiny_llama)
    for wrong in ({"samples": 0}, {"length": 1}, {"batch_size": 0}):
        with pytest.raises(CalibrationError, match=f"{next(iter(wrong))}="):
            load_calibration("docs", directory=tiny_llama, **wrong)
    with pytest.raises(CalibrationError, match="needs a model"):
        load_calibration("docs", directory=None)
    with pytest.raises(CalibrationError, match="tokenizer"):
        load_calibration("docs", directory=None, model=tiny_model("llama"))
    with pytest.raises(CheckpointError):
        load_calibration("docs", directory=tmp_path)


def test_own_texts_are_never_padded(tiny_llama, tiny_tokenizer):
    texts = ["the fox", "the quick brown fox " * 30, "the dog", "", "the lazy dog because it can"]
    data = load_calibration(texts, directory=tiny_llama, length=20)
    assert data.source == "texts" and data.samples == 4
    wanted = [tiny_tokenizer(text)["input_ids"][:20] for text in texts if text]
    assert sorted(_rows(data)) == sorted(wanted)
    assert data.tokens == sum(map(len, wanted))
    assert from_texts(texts, directory=tiny_llama, length=20, samples=2).samples == 2


def test_own_chats_go_through_the_template(tiny_llama, tiny_tokenizer):
    data = load_calibration([CHAT, CHAT], directory=tiny_llama)
    assert (
        tiny_tokenizer.batch_decode(data.batches[0]["input_ids"])
        == ["<user>the quick fox</s><assistant>jumps over the dog</s>"] * 2
    )
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    with pytest.raises(CalibrationError, match="no chat template"):
        load_calibration([CHAT], directory=tiny_llama, processor=bare)


def test_own_batches_are_taken_as_they_are(tiny_llama):
    batch = {
        "input_ids": torch.ones(2, 5, dtype=torch.int64),
        "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]),
    }
    data = load_calibration([batch], directory=tiny_llama)
    assert (data.source, data.samples, data.tokens) == ("batches", 2, 8)
    assert data.batches[0]["attention_mask"] is batch["attention_mask"]


def test_windows_start_with_the_bos(tiny_llama, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    rows = _rows(load_calibration("prose", directory=tiny_llama, processor=tokenizer, samples=4, length=32))
    assert all(len(row) == 32 and row[0] == 1 and 1 not in row[1:] for row in rows)


def test_encoders_get_short_texts_between_their_special_tokens(bert, caplog):
    assert find_needs(None, bert).kind == "encoder"
    data = load_calibration("docs", directory=bert, samples=8, length=512)
    model = BertModel.from_pretrained(bert)
    assert sorted(batch["input_ids"].shape[1] for batch in data.batches) == [12, 24, 48, 96]  # the tokenizer's limit
    for batch in data.batches:
        ids = batch["input_ids"]
        assert (ids[:, 0] == 2).all() and (ids[:, -1] == 3).all() and not (ids[:, 1:-1] == 3).any()
        assert model(**batch).last_hidden_state.shape == (2, ids.shape[1], 32)
    own = load_calibration(["a fox", "a dog", "words and words " * 50], directory=bert, length=16)
    assert sorted(len(row) for row in _rows(own)) == [6, 6, 16]
    sampled = load_calibration("self", directory=bert, samples=4, length=64)
    assert sampled.source == "docs+prose" and "cannot sample text" in caplog.text


def test_encoder_decoders_get_both_sides(t5):
    model = T5ForConditionalGeneration.from_pretrained(t5)
    data = load_calibration("prose", directory=t5, samples=4, length=32, batch_size=2)
    assert len(data.batches) == 2
    for batch in data.batches:
        assert set(batch) == {"input_ids", "decoder_input_ids"}
        assert batch["input_ids"].shape == (2, 16) and (batch["input_ids"][:, -1] == 2).all()
        assert batch["decoder_input_ids"].shape == (2, 16) and (batch["decoder_input_ids"][:, 0] == 0).all()
        assert not (batch["decoder_input_ids"][:, 1:] == 0).any()
        assert model(**batch).logits.shape == (2, 16, 384)
    assert load_calibration(["the quick brown fox"], directory=t5).samples == 1


def test_encoder_decoders_sample_their_own_answers(t5):
    options = {"directory": t5, "samples": 6, "length": 48}
    data = load_calibration("self", **options)
    assert data.source == "self" and data.samples == 6
    answers = [row.tolist() for batch in data.batches for row in batch["decoder_input_ids"]]
    assert all(answer[0] == 0 and len(answer) <= 23 and 2 not in answer for answer in answers)
    assert len({tuple(answer) for answer in answers}) == 6
    assert load_calibration("self", **options).sha256 == data.sha256
    assert load_calibration("self", seed=1, **options).sha256 != data.sha256
    model = T5ForConditionalGeneration.from_pretrained(t5)
    for batch in data.batches:
        assert torch.isfinite(model(**batch).logits).all()


def test_hub_datasets_of_texts_and_chats(tmp_path, tiny_llama):
    pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    for name, row in (("texts", {"text": "the quick brown fox " * 20}), ("chats", {"messages": CHAT, "n": 1})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text((json.dumps(row) + "\n") * 20)
    texts = load_calibration(f"hub:{tmp_path / 'texts'}", directory=tiny_llama, samples=3, length=32)
    assert texts.samples == 3 and texts.source.startswith("hub:")
    chats = load_calibration(f"hub:{tmp_path / 'chats'}:train", directory=tiny_llama, samples=3, length=32)
    assert chats.samples == 3
    with pytest.raises(CalibrationError, match="no column 'body'"):
        load_calibration(f"hub:{tmp_path / 'texts'}:train:body", directory=tiny_llama)
    with pytest.raises(CalibrationError, match="row 0 of dataset"):
        load_calibration(f"hub:{tmp_path / 'chats'}:train:n", directory=tiny_llama)
    with pytest.raises(CalibrationError, match="cannot load dataset 'org/absent'"):
        load_calibration("hub:org/absent", directory=tiny_llama)


def test_hub_datasets_need_their_package(monkeypatch, tiny_llama):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match="`datasets`"):
        load_calibration("hub:org/name", directory=tiny_llama)
