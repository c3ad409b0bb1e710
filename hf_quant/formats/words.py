"""Codes in int32 words: the little-endian bit stream that compressed-tensors, GPTQ and AWQ build their tensors from."""

from __future__ import annotations

import torch


def word_count(elements: int, bits: int) -> int:
    """int32 words for ``elements`` codes."""
    return -(-elements * bits // 32)


def to_words(packed: torch.Tensor) -> torch.Tensor:
    """Canonical bytes ``[n, width]`` -> int32 ``[n, ceil(width/4)]``: both are the same little-endian bit stream."""
    if packed.shape[1] % 4:
        packed = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    flat = packed.reshape(-1)  # flat, as a [1, n] that was a [n, 1] has strides that view() refuses
    if flat.storage_offset() % 4:
        flat = flat.clone()
    return flat.view(torch.int32).view(packed.shape[0], -1)


def from_words(words: torch.Tensor, elements: int, bits: int) -> torch.Tensor:
    """int32 ``[n, words]`` -> canonical bytes of ``elements`` codes a row."""
    packed = words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)
    width = -(-elements * bits // 8)
    half_byte = bits == 4 and elements % 2 == 1
    if packed.shape[1] != width or half_byte:
        packed = packed[:, :width].clone()
    if half_byte:
        packed[:, -1] &= 15  # padding that another writer may have left
    return packed
