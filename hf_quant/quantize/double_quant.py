"""Nest float32 scales into 8-bit codes in the layout, table and arithmetic of bitsandbytes (QLoRA, section 3)."""

from __future__ import annotations

from functools import lru_cache

import torch

from hf_quant.errors import FormatError
from hf_quant.grids import DOUBLE_QUANT_BLOCK
from hf_quant.tensor import DoubleQuant

_DECADES = 7
_SMALLEST = 1e-38  # keeps the reciprocal of an all-zero block finite, as bitsandbytes does


def nest(scale: torch.Tensor) -> DoubleQuant:
    """Double-quantize the scales of one weight.

    The mean of all scales is the offset; blocks of 256 scales (row-major over the whole weight) share a float32
    maximum, and each scale becomes the nearest entry of the dynamic table. Offset, maxima and table are bit for bit
    what bitsandbytes stores on the same device. The codes are the nearest ones, as on its torch backend; its native
    CPU kernel looks them up in a coarser table and is off by one entry for about one scale in a thousand.

    Args:
        scale: float32 ``[out, groups]``, finite.

    Returns:
        DoubleQuant with codes ``[out, groups]``; every reader uses its ``.scale()``, so choose weight codes for those.

    Raises:
        FormatError: not float32, not 2-D or empty.
    """
    if scale.dtype != torch.float32 or scale.dim() != 2 or scale.numel() == 0:
        raise FormatError(
            f"scales to nest are {scale.dtype} {list(scale.shape)}.", "pass a non-empty float32 [out, groups]."
        )
    flat = scale.reshape(-1)
    table = dynamic_table().to(scale.device)
    offset = flat.mean()
    padded = torch.nn.functional.pad(flat - offset, (0, -flat.numel() % DOUBLE_QUANT_BLOCK))
    centred = padded.view(-1, DOUBLE_QUANT_BLOCK)
    absmax = centred.abs().amax(dim=1)
    unit = centred.mul_(absmax.clamp(min=_SMALLEST).reciprocal_().unsqueeze(1)).clamp_(-1.0, 1.0)
    cells = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(unit, cells, out_int32=True).view(-1)[: flat.numel()]
    return DoubleQuant(codes.to(torch.uint8).view(scale.shape), absmax, offset, table)


@lru_cache(maxsize=1)
def _table() -> torch.Tensor:
    """256 signed values: decade k of 7 (up to 10**k) holds the midpoints of 2**k equal steps from 0.1 to 1; plus 0, 1.

    torch.linspace on the CPU is what bitsandbytes computes its table with, so the entries agree to the last bit.
    """
    positive = []
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float32, device="cpu")
        positive.append((edges[1:] + edges[:-1]) / 2.0 * 10.0 ** (decade - _DECADES + 1))
    half = torch.cat(positive)
    return torch.cat((half, -half, torch.tensor([0.0, 1.0]))).sort().values


def dynamic_table() -> torch.Tensor:
    """The signed 8-bit dynamic table (8-bit approximations, arXiv:1511.04561): float32 ``[256]``, ascending; a copy."""
    return _table().clone()
