"""Attention masks and positions of a call, as the native decoder takes them; None for those that it does not know."""

from __future__ import annotations

from typing import Any

import torch

from hf_quant.nn.slots import Slots

_NO_MASK = torch.empty(0, dtype=torch.bool)


def mask_of(mask: Any, rows: int, news: int, slots: Slots) -> torch.Tensor | None:
    """``[rows, >= past + news]``, nonzero where a token may be attended to by those after it; empty for no mask.

    None for masks that say more than that: not causal, tokens that see different ones before them, or float numbers.
    """
    if isinstance(mask, dict):  # what generate makes for models that may have sliding layers
        mask = mask.get("full_attention", False)
    if mask is None:
        return _NO_MASK
    if type(mask) is not torch.Tensor or mask.device.type != "cpu":
        return None
    length = slots.past + news
    if mask.dim() == 4 and mask.dtype == torch.bool and mask.shape[1:3] == (1, news) and mask.shape[3] >= length:
        found = mask[:, 0, -1]
        if news > 1 and not _causal(mask[:, 0], found, slots.past):
            return None
        mask = found.expand(rows, -1) if found.shape[0] == 1 else found
    elif mask.dim() != 2 or mask.is_floating_point():
        return None
    if mask.shape[0] != rows or mask.shape[1] < length or (slots.lengths is None and mask.shape[1] != length):
        return None
    if mask.dtype not in (torch.int64, torch.bool, torch.uint8):
        mask = mask != 0
    if news > 1 and not bool(mask[:, :length].any(dim=1).all()):
        return None
    return mask if mask.stride(1) == 1 else mask.contiguous()


def _causal(mask: torch.Tensor, last: torch.Tensor, past: int) -> bool:
    """Whether ``mask [rows, news, tokens]`` lets every token see what the last one sees up to itself."""
    expected = last.unsqueeze(1) & torch.ones(mask.shape[1:], dtype=torch.bool).tril_(past)
    return torch.equal(mask, expected)


def positions_of(positions: torch.Tensor | None, rows: int, news: int, past: int, masked: bool) -> torch.Tensor | None:
    """int64 ``[rows or 1, news]``: the positions of the new tokens; None when they are given in another form.

    Without a mask, positions that start again mean several sequences in one row to transformers: None as well.
    """
    if positions is None:
        return torch.arange(past, past + news).unsqueeze(0)
    if type(positions) is not torch.Tensor or positions.dim() != 2 or positions.shape[1] != news:
        return None
    if positions.shape[0] not in (1, rows) or positions.dtype != torch.int64 or positions.device.type != "cpu":
        return None
    if news > 1 and not masked and not bool((positions.diff(dim=1) == 1).all()):
        return None
    return positions.contiguous()
