"""Held-out text, cut into fixed windows of tokens (the texts themselves: hf_quant/texts)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_quant.errors import EvaluationError
from hf_quant.texts import BUILT_IN, HUB_PREFIX, Part, Text, load_text
from hf_quant.texts.windows import Tokenizer, leading_bos, spread_tiles

__all__ = ["BUILT_IN", "HUB_PREFIX", "Part", "Text", "Tokenizer", "Windows", "cut_windows", "load_text"]


@dataclass(frozen=True)
class Windows:
    """Token windows of one text.

    Attributes:
        text: where they were cut from.
        ids: int64 ``[windows, length]`` on the CPU.
        bos: every window starts with the tokenizer's beginning-of-sequence token (because the tokenizer adds one).
    """

    text: Text
    ids: torch.Tensor
    bos: bool


def cut_windows(text: Text, tokenizer: Tokenizer, count: int, length: int, seed: int) -> Windows:
    """Cut ``count`` windows of ``length`` tokens that do not overlap, spread over the text by ``seed``.

    The text is tokenized once and tiled; the tiles are divided into ``count`` runs, and each run gives one tile.
    Raises EvaluationError when the request makes no sense or the text is too short (saying how many windows fit).
    """
    if count < 2:
        raise EvaluationError(f"windows={count} gives no confidence interval.", "use at least 2 windows.")
    if length < 2:
        raise EvaluationError(f"length={length} scores no token.", "use windows of at least 2 tokens.")
    bos_id = leading_bos(tokenizer)
    fresh = length - (bos_id is not None)
    ids: Sequence[int] = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    fit = len(ids) // fresh
    if fit < count:
        raise EvaluationError(
            f"text {text.name!r} has {len(ids)} tokens: {fit} windows of {length} fit, {count} were asked for.",
            f"use a longer text, or {f'windows={fit}' if fit > 1 else 'a shorter length'}.",
        )
    rows = spread_tiles(ids, fresh, count, seed)
    if bos_id is not None:
        rows = torch.cat((torch.full((count, 1), bos_id, dtype=torch.int64), rows), dim=1)
    return Windows(text, rows, bos_id is not None)
