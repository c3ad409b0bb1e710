"""Tokens cut into windows that do not overlap; the beginning-of-sequence token where the tokenizer puts one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Tokenizer(Protocol):
    """What we need of a transformers tokenizer."""

    bos_token_id: int | None

    def __call__(self, text: str, **kwargs: Any) -> Any: ...


def leading_bos(tokenizer: Tokenizer) -> int | None:
    """The BOS id when the tokenizer puts one before a text (models trained with it are lost without it)."""
    start = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and len(start) > 0 and start[0] == bos else None


def spread_tiles(ids: Sequence[int], length: int, count: int, seed: int) -> torch.Tensor:
    """Tile ``ids``, divide the tiles into ``count`` runs and take one tile of each run by ``seed``.

    Returns:
        int64 ``[count, length]``. The caller has checked that ``count`` tiles fit.
    """
    fit = len(ids) // length
    generator = random.Random(seed)
    picks = [generator.randrange(fit * i // count, fit * (i + 1) // count) for i in range(count)]
    return torch.tensor([list(ids[pick * length : (pick + 1) * length]) for pick in picks], dtype=torch.int64)
