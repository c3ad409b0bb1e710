"""The tokenizer in a GGUF file: the rule that cuts text is recognized or refused, pieces and scores are the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from gguf import GGUFReader, TokenType
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_quant.errors import CheckpointError, FormatError
from hf_quant.export.gguf_tokenizer import add_tokenizer, byte_level_rule

# as the tokenizer.json of Llama 3, Qwen 2 and Mistral Nemo have them
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes(use_regex: bool, prefix: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)


def _split(regex: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    return pre_tokenizers.Sequence([split, _bytes(use_regex=False)])


def _described(rule: Any, ignore_merges: bool = False, normalizer: Any = None) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = rule
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return json.loads(tokenizer.to_str())


@pytest.mark.parametrize(
    ("rule", "ignore_merges", "name"),
    [
        (_bytes(use_regex=True), False, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _bytes(use_regex=True)]), False, "smollm"),
        (_split(LLAMA3), True, "llama-bpe"),
        (_split(QWEN2), False, "qwen2"),
        (_split(TEKKEN), True, "tekken"),
    ],
)
def test_rules_are_known_by_what_they_do(rule, ignore_merges, name) -> None:
    assert byte_level_rule(_described(rule, ignore_merges)) == (name, [])
    assert len(byte_level_rule(_described(rule, not ignore_merges))[1]) == 1
    _, (note,) = byte_level_rule(_described(rule, ignore_merges, normalizers.NFC()))
    assert "NFC" in note


@pytest.mark.parametrize(
    ("rule", "normalizer", "match"),
    [
        (_split(QWEN2 + "|x"), None, "cuts text by .* not known to be the same"),
        (_bytes(use_regex=True, prefix=True), None, "cuts text by"),
        (pre_tokenizers.Whitespace(), None, "cuts text by"),
        (_bytes(use_regex=True), normalizers.Lowercase(), "normalizes text by .*Lowercase"),
    ],
)
def test_other_rules_are_refused(rule, normalizer, match) -> None:
    with pytest.raises(FormatError, match=match):
        byte_level_rule(_described(rule, normalizer=normalizer))


@pytest.fixture(scope="module")
def sentencepiece_directory(tmp_path_factory) -> Path:
    """A Llama-2-like tokenizer: tokenizer.model with byte pieces, and one more token of a fine-tune."""
    path = tmp_path_factory.mktemp("sentencepiece")
    (path / "text.txt").write_text("the quick brown fox jumps over the lazy dog because it can\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "text.txt"),
        model_prefix=str(path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    vocabulary = {pieces.IdToPiece(i): i for i in range(300)}
    fast = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    marked = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, **marked)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.save_pretrained(path)
    return path


def _written(directory: Path, rows: int, file: Path) -> dict[str, Any]:
    writer = gguf.GGUFWriter(file, "llama")
    add_tokenizer(writer, directory, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def test_sentencepiece_keeps_its_pieces_scores_and_kinds(sentencepiece_directory, tmp_path) -> None:
    assert (sentencepiece_directory / "tokenizer.json").is_file()
    fields = _written(sentencepiece_directory, 304, tmp_path / "file.gguf")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_directory / "tokenizer.model"))
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    kinds = fields["tokenizer.ggml.token_type"]
    assert fields["tokenizer.ggml.model"] == "llama" and len(tokens) == len(scores) == len(kinds) == 304
    assert tokens[:300] == [pieces.IdToPiece(i) for i in range(300)]
    assert scores[259:300] == [pytest.approx(pieces.GetScore(i)) for i in range(259, 300)]
    assert kinds[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert kinds[270] == TokenType.NORMAL
    assert (tokens[300], kinds[300]) == ("<|turn|>", TokenType.CONTROL)
    assert kinds[301:] == [TokenType.UNUSED] * 3
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.ggml.add_space_prefix"] is True


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(sentencepiece_directory, tmp_path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "llama")
    with pytest.raises(CheckpointError, match="token 300, but the embedding has 300 rows"):
        add_tokenizer(writer, sentencepiece_directory, 300)


def test_pieces_without_their_scores_are_refused(sentencepiece_directory, tmp_path) -> None:
    text = (sentencepiece_directory / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"from which llama\.cpp's cannot be written"):
        add_tokenizer(gguf.GGUFWriter(tmp_path / "file.gguf", "llama"), tmp_path, 304)
