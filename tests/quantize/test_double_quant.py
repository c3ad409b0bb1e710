"""Nested scales: the library's own layout and arithmetic, and codes that are never worse than its own."""

from __future__ import annotations

import bitsandbytes.functional as functional
import pytest
import torch

from hf_quant.errors import FormatError
from hf_quant.quantize.double_quant import dynamic_table, nest


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def test_table_is_the_library_s_table() -> None:
    assert torch.equal(_bits(dynamic_table()), _bits(functional.create_dynamic_map()))


@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (16, 16), (7, 333), (64, 20)])
def test_offset_and_maxima_equal_the_library_s(shape: tuple[int, int]) -> None:
    scale = torch.rand(shape) * 0.1 + 0.01
    nested = nest(scale)
    offset = scale.reshape(-1).mean()
    codes, state = functional.quantize_blockwise(scale.reshape(-1) - offset, blocksize=256)
    assert torch.equal(_bits(nested.offset), _bits(offset))
    assert torch.equal(_bits(nested.absmax), _bits(state.absmax))
    assert torch.equal(_bits(nested.table), _bits(state.code))
    # its CPU kernel looks codes up in a coarser table: ours agree but for near ties, and are nearer there
    assert (nested.codes.reshape(-1) != codes).float().mean() < 0.01
    ours = (nested.scale().reshape(-1) - scale.reshape(-1)).abs()
    theirs = (functional.dequantize_blockwise(codes, state) + offset - scale.reshape(-1)).abs()
    assert bool((ours <= theirs + 1e-7).all())


@pytest.mark.parametrize("size", [3, 256, 700, 5000])
def test_codes_are_the_nearest_entries(size: int) -> None:
    scale = torch.randn(1, size)
    nested = nest(scale)
    maxima = nested.absmax.repeat_interleave(256)[:size].double()
    unit = (scale.reshape(-1) - nested.offset).double() / maxima
    chosen = (unit - nested.table.double()[nested.codes.reshape(-1).int()]).abs()
    best = (unit.unsqueeze(1) - nested.table.double()).abs().amin(dim=1)
    assert bool((chosen <= best + 1e-7).all())


def test_reader_gets_the_same_scales() -> None:
    scale = torch.randn(33, 21) * 0.02
    nested = nest(scale)
    state = functional.QuantState(absmax=nested.absmax, code=nested.table, blocksize=256, dtype=torch.float32)
    read = functional.dequantize_blockwise(nested.codes.reshape(-1), state) + nested.offset
    assert torch.equal(_bits(read.view(33, 21)), _bits(nested.scale()))


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_equal_scales_survive(value: float) -> None:
    nested = nest(torch.full((4, 100), value))
    assert torch.allclose(nested.scale(), torch.full((4, 100), value), rtol=1e-6)


@pytest.mark.parametrize(
    "scale", [torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(4), torch.ones(0, 4)], ids=["dtype", "rank", "empty"]
)
def test_bad_scales_are_refused(scale: torch.Tensor) -> None:
    with pytest.raises(FormatError, match="scales to nest"):
        nest(scale)
