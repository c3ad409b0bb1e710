"""The tokenizer of a checkpoint in a GGUF file: llama.cpp splits and merges text itself and has to be told how.

Byte-level BPE goes by the rule in tokenizer.json that cuts text into words: llama.cpp has a fixed set of such rules,
by name (``tokenizer.ggml.pre``, src/llama-vocab.cpp). Which one a tokenizer has is read from the rule itself, not from
a list of models, and a rule that is not on the list is refused. Everything else is gguf-py's own reading of the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from transformers import AutoTokenizer

from hf_quant.checkpoint import read_json
from hf_quant.errors import CheckpointError, FormatError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = ("ByteLevel", False)  # bytes as letters, after another step has cut the text
# the steps of a rule -> its name in llama.cpp, and whether words that are tokens skip the merges there
_RULES: dict[tuple[tuple[Any, ...], ...], tuple[str, bool]] = {
    (("ByteLevel", True),): ("gpt-2", False),
    (("Digits", True), ("ByteLevel", True)): ("smollm", False),
    (("Split", _LLAMA3), _BYTES): ("llama-bpe", True),
    (("Split", _QWEN2), _BYTES): ("qwen2", False),
    (("Split", _TEKKEN), _BYTES): ("tekken", True),
}
_ADDED_SCORE = -1000.0  # of a token that no merge makes
_TOKENIZER_LIMIT = 256 * 2**20


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path, rows: int, *, trust_remote_code: bool = False) -> list[str]:
    """Write the vocabulary, how text is cut, the special tokens and the chat template.

    Args:
        writer: of the file.
        directory: with the tokenizer's files.
        rows: of the embedding; rows beyond the vocabulary get tokens that no text has.
        trust_remote_code: run tokenizer code that comes with the checkpoint.

    Returns:
        what a user should know, in words.

    Raises:
        CheckpointError: there is no tokenizer, or it has more tokens than the embedding.
        FormatError: one that llama.cpp is not known to reproduce.
    """
    described: dict[str, Any] = {}
    if (directory / "tokenizer.json").is_file():
        described = read_json(directory, "tokenizer.json", _TOKENIZER_LIMIT)
    model = described.get("model", {})
    notes: list[str] = []
    if model.get("type") == "BPE" and not model.get("byte_fallback"):
        name, notes = byte_level_rule(described)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        vocabulary = _byte_level(described)
        merges = True
    elif (directory / "tokenizer.model").is_file():
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        vocabulary = _sentencepiece(directory, described)
        merges = False
    else:
        found = f"a tokenizer of type {model.get('type')}" if described else "no tokenizer.json and no tokenizer.model"
        raise CheckpointError(
            f"{directory} has {found}, from which llama.cpp's cannot be written.",
            "put the model's tokenizer.model (sentencepiece) beside it; byte-level BPE needs tokenizer.json only.",
        )
    last = max(vocabulary)
    if last >= rows:
        raise CheckpointError(
            f"{directory} has a tokenizer with token {last}, but the embedding has {rows} rows.",
            "use the tokenizer that belongs to the model.",
        )
    unused = (b"", _ADDED_SCORE, gguf.TokenType.UNUSED)
    tokens = [vocabulary.get(row, (f"[PAD{row}]".encode(), *unused[1:])) for row in range(rows)]
    writer.add_token_list([text for text, _, _ in tokens])
    if not merges:
        writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    special = gguf.SpecialVocab(directory, load_merges=merges, n_vocab=rows)
    # seen, not read: that is what the model was given
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    ids = tokenizer("a")["input_ids"]
    special.add_special_token = {
        "bos": ids[0] == tokenizer.bos_token_id,
        "eos": ids[-1] == tokenizer.eos_token_id,
    }
    writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    special.add_to_gguf(writer, quiet=True)
    return notes


def byte_level_rule(described: Mapping[str, Any]) -> tuple[str, list[str]]:
    """llama.cpp's name for how a byte-level BPE cuts text, and what differs there.

    Args:
        described: the contents of tokenizer.json.

    Raises:
        FormatError: a rule or a normalization that is not known to be the same in llama.cpp.
    """
    rule = described.get("pre_tokenizer") or {}
    steps = tuple(_step(step) for step in rule.get("pretokenizers", [rule]))
    known = _RULES.get(steps)
    normalizer = described.get("normalizer") or {}
    if known is None or normalizer.get("type") not in (None, "NFC"):
        what = f"cuts text by {rule}" if known is None else f"normalizes text by {normalizer}"
        raise FormatError(
            f"the tokenizer {what}, which is not known to be the same in llama.cpp.",
            "convert the float model with llama.cpp's own converter, which knows models by name.",
        )
    name, skips = known
    notes = []
    if normalizer:
        notes.append("llama.cpp does not normalize text (NFC): text in another form is cut into other tokens")
    if bool(described["model"].get("ignore_merges")) != skips:
        notes.append(f"llama.cpp's {name!r} {'lets' if skips else 'never lets'} words that are tokens skip the merges")
    return name, notes


def _step(step: Mapping[str, Any]) -> tuple[Any, ...]:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return kind, bool(step.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(step.get("individual_digits"))
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return kind, step.get("pattern", {}).get("Regex")
    return (str(step),)


Token = tuple[bytes, float, gguf.TokenType]


def _byte_level(described: Mapping[str, Any]) -> dict[int, Token]:
    normal = gguf.TokenType.NORMAL
    found = {id_: (text.encode(), 0.0, normal) for text, id_ in described["model"]["vocab"].items()}
    return found | _added(described)


def _sentencepiece(directory: Path, described: Mapping[str, Any]) -> dict[int, Token]:
    found = dict(enumerate(gguf.vocab.SentencePieceVocab(directory).all_tokens()))
    for id_, token in _added(described).items():
        # a piece that the model itself marks (unknown, byte, control) stays what it is
        if id_ not in found or found[id_][2] == gguf.TokenType.NORMAL:
            found[id_] = token
    return found


def _added(described: Mapping[str, Any]) -> dict[int, Token]:
    """Tokens that are found in a text before it is cut."""
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    return {
        token["id"]: (token["content"].encode(), _ADDED_SCORE, kinds[bool(token["special"])])
        for token in described.get("added_tokens", [])
    }
