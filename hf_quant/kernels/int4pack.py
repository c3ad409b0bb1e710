"""The memory layout of torch's int4 product on CPU: bytes in, bytes out, exactly invertible.

The rows of the weight are cut into blocks (64 rows with AVX-512, 32 with AVX2). A block of ``block`` rows is stored
column by column, ``block / 2`` bytes each: byte ``i`` holds row ``i`` in its low nibble and row ``i + block / 2`` in
its high nibble. Nothing documents this, so :func:`block_rows` compares it with what torch does on this machine.

8-bit codes fit the same op as they are: whole bytes, ``block / 2`` rows side by side, column by column. The op then
sees ``2 * out`` rows of 4-bit codes, for each row of the weight one of its low nibbles and, ``block / 2`` further on,
one of its high nibbles, which may have scales of their own; their products are added (:func:`join_nibbles`).
"""

from __future__ import annotations

import torch

BLOCKS = (64, 32)


def available() -> bool:
    """Whether this torch has the ops (2.6 and later)."""
    return hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")


def block_rows() -> int | None:
    """The rows of a block on this machine; None when torch lays the codes out in another way."""
    with torch.inference_mode(False):
        codes = (torch.arange(128 * 32, dtype=torch.int32, device="cpu").view(128, 32) * 37 % 251 % 16).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        return next((block for block in BLOCKS if torch.equal(pack(codes, block), packed)), None)


def op_group(group: int) -> int | None:
    """The widest group of the op that divides ``group``, whose scales then repeat; None when there is none."""
    size = min(group & -group, 256)
    return size if size >= 32 else None


def pack(codes: torch.Tensor, block: int) -> torch.Tensor:
    """4-bit uint8 codes ``[out, in]`` -> bytes ``[out, in/2]``; ``out`` is a multiple of ``block``."""
    out, columns = codes.shape
    halves = codes.view(-1, 2, block // 2, columns)
    packed = (halves[:, 0] | (halves[:, 1] << 4)).transpose(1, 2)
    return packed.contiguous().view(out, columns // 2)


def unpack(packed: torch.Tensor, block: int) -> torch.Tensor:
    """The inverse of :func:`pack`: bytes ``[out, in/2]`` -> uint8 codes ``[out, in]``."""
    out, columns = packed.shape[0], packed.shape[1] * 2
    blocks = packed.view(-1, columns, block // 2).transpose(1, 2)
    return torch.cat((blocks & 15, blocks >> 4), dim=1).contiguous().view(out, columns)


def pack_bytes(codes: torch.Tensor, block: int) -> torch.Tensor:
    """8-bit codes ``[out, in]`` -> bytes ``[out, in]``; ``out`` is a multiple of ``block / 2``."""
    return codes.view(-1, block // 2, codes.shape[1]).transpose(1, 2).contiguous().view(codes.shape)


def unpack_bytes(packed: torch.Tensor, block: int) -> torch.Tensor:
    """The inverse of :func:`pack_bytes`."""
    return packed.view(-1, packed.shape[1], block // 2).transpose(1, 2).contiguous().view(packed.shape)


def join_nibbles(y: torch.Tensor, block: int) -> torch.Tensor:
    """Products of the low and of the high nibbles ``[rows, 2 * out]`` -> their sums ``[rows, out]``."""
    low, high = y.view(y.shape[0], -1, 2, block // 2).unbind(2)
    return (low + high).view(y.shape[0], -1)


def columns_first(packed: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """Codes of whole blocks as uint8 ``[in, out]``, the order in which the bytes lie; what comes back is a copy."""
    columns = packed.shape[1] * 8 // bits
    bytes_first = packed.view(-1, columns, block // 2).transpose(0, 1)
    if bits == 8:
        return bytes_first.contiguous().view(columns, -1)
    return torch.cat((bytes_first & 15, bytes_first >> 4), dim=-1).view(columns, -1)
