"""Text and chats to batches: read from files and datasets, tokenized, cut into windows as the model wants them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jinja2 import TemplateError
from torch import Tensor

from hf_quant.calibration.needs import Needs
from hf_quant.errors import CalibrationError
from hf_quant.texts.windows import leading_bos, spread_tiles

Document: TypeAlias = "str | list[dict[str, Any]]"  # a text, or the messages of a chat

_ENCODER_SHARES = (1, 2, 4, 8)  # encoders mostly read short texts: windows of length, length / 2, / 4 and / 8 in turn
_SHORTEST = 8


def read_documents(path: Path) -> list[Document]:
    """The texts or chats in a file: ``.jsonl`` / ``.json`` (rows with ``text`` or ``messages``), else one UTF-8 text.

    Raises:
        CalibrationError: the file cannot be read, is empty or damaged, or a row has neither column.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text: {error}.", "convert it to UTF-8.") from error
    except OSError as error:
        raise CalibrationError(
            f"cannot read the calibration file {str(path)!r}: {error.strerror}.", "give a .txt, .md, .jsonl or .json."
        ) from error
    if not content.strip():
        raise CalibrationError(f"the calibration file {path} is empty.", "give a file with text in it.")
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".json"):
        return [content]
    try:
        if suffix == ".json":
            rows = json.loads(content)
        else:
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path} is not {suffix[1:].upper()}: {error}.", "repair it.") from error
    if not isinstance(rows, list):
        raise CalibrationError(f"{path} holds {type(rows).__name__}, not a list of rows.", "give a list of objects.")
    return [read_row(row, f"row {number} of {path.name}") for number, row in enumerate(rows, 1)]


def read_row(row: Any, where: str, column: str | None = None) -> Document:
    """The text or chat of one row: its ``column``, or else ``messages`` or ``text``; raises CalibrationError."""
    if isinstance(row, str):
        return row
    keys = list(row) if isinstance(row, Mapping) else []
    for key in (column,) if column else ("messages", "text"):
        value = row[key] if key in keys else None
        if isinstance(value, str) or (value and is_chat(value)):
            return value if isinstance(value, str) else [dict(message) for message in value]
    wanted = repr(column) if column else "'text' (a string) or 'messages' (a list of {role, content})"
    raise CalibrationError(
        f"{where} has no column {wanted}; it has {', '.join(map(repr, keys)) or 'none'}.", "rename the column."
    )


def is_chat(value: Any) -> bool:
    """A list of messages: mappings with ``role`` and ``content``."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, (str, bytes))
        and all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in value)
    )


def encode_document(document: Document, tokenizer: Any, special: bool) -> list[int]:
    """Token ids of a text, or of a chat through the tokenizer's chat template; raises CalibrationError.

    Args:
        document: text or messages.
        tokenizer: the model's.
        special: add the tokenizer's special tokens to a text (a chat template writes its own).
    """
    if isinstance(document, str):
        return list(tokenizer(document, add_special_tokens=special, verbose=False)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            "the calibration data is made of chat messages, but the tokenizer has no chat template.",
            "give plain texts, or set tokenizer.chat_template.",
        )
    try:
        rendered = tokenizer.apply_chat_template(document, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"the tokenizer's chat template cannot render a chat of the calibration data: {error}.",
            "check the roles and contents of its messages.",
        ) from error
    return list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])


def token_stream(documents: Iterable[Document], tokenizer: Any, enough: int | None = None) -> list[int]:
    """Documents one after the other, texts with a blank line between them; stops after ``enough`` tokens."""
    ids: list[int] = []
    gap = list(tokenizer("\n\n", add_special_tokens=False)["input_ids"])
    for document in documents:
        if ids and isinstance(document, str):
            ids += gap
        ids += encode_document(document, tokenizer, special=False)
        if enough is not None and len(ids) >= enough:
            break
    return ids


def window_samples(
    ids: Sequence[int], needs: Needs, tokenizer: Any, *, samples: int, length: int, seed: int, source: str
) -> list[dict[str, Tensor]]:
    """Cut a stream of tokens into samples of one row each, spread over the stream; fewer where fewer fit.

    - decoders: windows of exactly ``length`` tokens, after a BOS where the tokenizer puts one;
    - encoders: windows of ``length``, a half, a quarter and an eighth of it in turn (at least 8), within the
      tokenizer's special tokens;
    - encoder-decoders: the first half of a window (with the tokenizer's special tokens) to the encoder, the second,
      shifted right, to the decoder.

    Raises:
        CalibrationError: the stream is too short for one window.
    """
    if needs.kind == "encoder":
        before, after = special_tokens(tokenizer)
        lengths = [max(length // share, min(length, _SHORTEST)) for share in _ENCODER_SHARES]
        inner = max(length - len(before) - len(after), 1)
        windows = _tiles(ids, inner, samples, seed, source, length)
        rows = []
        for index, window in enumerate(windows):
            keep = max(lengths[index % len(lengths)] - len(before) - len(after), 1)
            rows.append({"input_ids": torch.tensor([[*before, *window[:keep].tolist(), *after]])})
        return rows
    if needs.kind == "seq2seq":
        windows = _tiles(ids, length, samples, seed, source, length)
        return [seq2seq_sample(window.tolist(), needs, tokenizer) for window in windows]
    bos = leading_bos(tokenizer)
    windows = _tiles(ids, length - (bos is not None), samples, seed, source, length)
    if bos is not None:
        windows = torch.cat((torch.full((len(windows), 1), bos), windows), dim=1)
    return [{"input_ids": window[None]} for window in windows]


def text_samples(
    documents: Sequence[Document], needs: Needs, tokenizer: Any, *, samples: int, length: int, source: str
) -> list[dict[str, Tensor]]:
    """One sample per document (the first ``samples`` of them), cut at ``length`` tokens and never padded.

    Raises:
        CalibrationError: none of them has a token.
    """
    rows: list[dict[str, Tensor]] = []
    for document in documents:
        if len(rows) == samples:
            break
        ids = encode_document(document, tokenizer, special=needs.kind == "decoder")
        if len(ids) < (2 if needs.kind == "seq2seq" else 1):
            continue
        if needs.kind == "encoder":
            before, after = special_tokens(tokenizer)
            rows.append({"input_ids": torch.tensor([[*before, *ids[: length - len(before) - len(after)], *after]])})
        elif needs.kind == "seq2seq":
            rows.append(seq2seq_sample(ids[:length], needs, tokenizer))
        else:
            rows.append({"input_ids": torch.tensor([ids[:length]])})
    if not rows:
        raise CalibrationError(f"the texts of {source!r} have no tokens.", "give texts that are not empty.")
    return rows


def seq2seq_sample(ids: Sequence[int], needs: Needs, tokenizer: Any) -> dict[str, Tensor]:
    """``ids`` (at least 2): the first half for the encoder, the second half, shifted right, for the decoder."""
    before, after = special_tokens(tokenizer)
    half = len(ids) // 2
    first = list(ids[: max(half - len(before) - len(after), 1)])
    return {
        "input_ids": torch.tensor([[*before, *first, *after]]),
        "decoder_input_ids": torch.tensor([[needs.start_token, *ids[half:-1]]]),
    }


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text, such as [CLS] and [SEP]."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _tiles(ids: Sequence[int], size: int, samples: int, seed: int, source: str, length: int) -> Tensor:
    fit = len(ids) // size
    if fit == 0:
        raise CalibrationError(
            f"the calibration source {source!r} has {len(ids)} tokens, one sequence of {length} needs {size}.",
            f"give a longer text, or a length of at most {max(len(ids), 1)}.",
        )
    return spread_tiles(ids, size, min(samples, fit), seed)
