"""GGUF's blocks against gguf-py's own dequantization: the same values, bit for bit."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType, dequantize

from hf_quant.errors import FormatError
from hf_quant.formats import gguf
from hf_quant.grids import Scheme
from hf_quant.tensor import QuantizedTensor


def _tensor(scheme: Scheme, scale: torch.Tensor | None = None, columns: int = 256) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(3)
    groups = scheme.groups(columns)
    codes = torch.randint(0, 2**scheme.bits, (6, columns), generator=generator, dtype=torch.uint8)
    codes[0, :2] = torch.tensor([0, 2**scheme.bits - 1], dtype=torch.uint8)
    if scale is None:
        scale = (torch.randn(6, groups, generator=generator) * 0.01).half()
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(0, 2**scheme.bits, (6, groups), generator=generator, dtype=torch.uint8)
    return QuantizedTensor.from_codes(codes, scale, zero, scheme)


def _read(tensor: QuantizedTensor, **options: bool) -> torch.Tensor:
    kind = GGMLQuantizationType[gguf.type_of(tensor.scheme)]
    return torch.from_numpy(dequantize(gguf.encode(tensor, name="layer", **options).numpy(), kind))


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_symmetric_weights_are_the_same_bit_for_bit(bits, group, dtype) -> None:
    scheme = Scheme(bits=bits, group_size=group)
    scale = torch.randn(6, scheme.groups(256), generator=torch.Generator().manual_seed(1)).mul(0.01).to(dtype)
    scale[0, 0] = 0
    tensor = _tensor(scheme, scale)
    assert bool((tensor.scales() < 0).any())  # a negative scale is a scale
    assert gguf.rounding(tensor).exact
    assert torch.equal(_read(tensor), tensor.dequantize())


def test_zero_points_are_exact_where_float16_has_the_offset() -> None:
    scheme = Scheme(symmetric=False, group_size=64)
    tensor = _tensor(scheme, torch.full((6, 4), 0.0078125, dtype=torch.bfloat16))  # a power of two
    assert gguf.type_of(scheme) == "Q4_1"
    assert gguf.rounding(tensor).exact
    assert torch.equal(_read(tensor), tensor.dequantize())


def test_offsets_that_float16_does_not_have_are_refused_or_measured() -> None:
    scheme = Scheme(symmetric=False, group_size=32)
    tensor = _tensor(scheme, torch.full((6, 8), 255 / 128 * 2**-6, dtype=torch.bfloat16))  # 8 significant bits
    cost = gguf.rounding(tensor)
    assert 0 < cost.blocks <= cost.of == 48
    with pytest.raises(FormatError, match=r"layer cannot be converted exactly: \d+ of 48 blocks .* of its step"):
        gguf.encode(tensor, name="layer")
    moved = (_read(tensor, round_scales=True) - tensor.dequantize()).abs().max() / tensor.scales().float().max()
    assert 0 < moved <= cost.steps < 0.01


@pytest.mark.parametrize("bits", [4, 8])
def test_float32_scales_move_by_what_is_stated(bits) -> None:
    scheme = Scheme(bits=bits, group_size=32)
    tensor = _tensor(scheme, torch.rand(6, 8, generator=torch.Generator().manual_seed(2)) * 0.01 + 0.005)
    cost = gguf.rounding(tensor)
    steps = tensor.scales().repeat_interleave(32, dim=1)
    moved = float(((_read(tensor, round_scales=True) - tensor.dequantize()).abs() / steps).max())
    assert cost.blocks == cost.of
    assert 0.5 * cost.steps < moved <= cost.steps * 1.0001


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_scales_beyond_float16_are_refused_even_with_rounding(scale) -> None:
    tensor = _tensor(Scheme(group_size=32), torch.full((6, 8), scale))
    with pytest.raises(FormatError, match="float16 does not reach"):
        gguf.encode(tensor, name="layer", round_scales=True)


@pytest.mark.parametrize(
    ("scheme", "shape", "match"),
    [
        (Scheme(grid="nf4", group_size=32), (4, 64), "no nf4 blocks"),
        (Scheme(grid="fp4", group_size=32), (4, 64), "no fp4 blocks"),
        (Scheme(bits=8, symmetric=False), (4, 64), "no zero points"),
        (Scheme(group_size=16), (4, 64), "groups of 16 columns"),
        (Scheme(group_size=48), (4, 96), "groups of 48 columns"),
        (Scheme(group_size=-1), (4, 72), "rows of 72 columns"),
        (Scheme(), (2, 4, 64), "2-D weights"),
    ],
)
def test_what_does_not_fit_is_named(scheme, shape, match) -> None:
    assert match in str(gguf.holds(scheme, "Linear", shape))


def test_reordered_columns_are_refused() -> None:
    plain = _tensor(Scheme(group_size=32))
    order = torch.arange(255, -1, -1, dtype=torch.int32)
    tensor = QuantizedTensor(plain.packed, plain.scale, None, plain.scheme, plain.shape, order=order)
    with pytest.raises(FormatError, match="act-order"):
        gguf.encode(tensor, name="layer")
