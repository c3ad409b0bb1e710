"""Scales and zero points in the order of the native kernels: 16 output rows side by side, as their codes are tiled."""

from __future__ import annotations

import torch

ROWS = 16  # output rows of a tile: the float32 lanes of a 512-bit register


def rows_to_tiles(rows: torch.Tensor) -> torch.Tensor:
    """``[out, groups]`` -> contiguous ``[tiles, groups, 16]``; rows past the end are zeros."""
    missing = -rows.shape[0] % ROWS
    if missing:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
    return rows.view(-1, ROWS, rows.shape[1]).transpose(1, 2).contiguous()


def tiles_to_rows(tiled: torch.Tensor, out_features: int) -> torch.Tensor:
    """The inverse of :func:`rows_to_tiles`: contiguous ``[out, groups]``."""
    rows = tiled.transpose(1, 2).reshape(-1, tiled.shape[1])
    return rows[:out_features].clone() if rows.shape[0] != out_features else rows
