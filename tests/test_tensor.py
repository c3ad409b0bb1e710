"""Grids and the canonical packing: the definitions that kernels and formats are held to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_quant.errors import ConfigError, FormatError
from hf_quant.grids import FP4_LEVELS, NF4_LEVELS, PER_CHANNEL, Scheme, decode, levels
from hf_quant.quantize.double_quant import nest
from hf_quant.tensor import QuantizedTensor, pack_codes, unpack_codes


@given(rows=st.integers(1, 9), columns=st.integers(1, 33), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_packing_is_its_own_inverse(rows: int, columns: int, bits: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, columns if bits == 8 else (columns + 1) // 2)
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


def test_the_even_column_is_in_the_low_nibble() -> None:
    assert pack_codes(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]


def test_levels_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for grid in ("nf4", "fp4"):
        assert torch.equal(levels(grid), functional.get_4bit_type(grid, device="cpu"))


def test_decode_by_hand() -> None:
    codes = torch.tensor([[0, 8, 15, 9]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, -2.0]])
    symmetric = decode(codes, scale, None, Scheme(group_size=2))
    assert symmetric.tolist() == [[-4.0, 0.0, -14.0, -2.0]]
    zero = torch.tensor([[1, 15]], dtype=torch.uint8)
    assert decode(codes, scale, zero, Scheme(symmetric=False, group_size=2)).tolist() == [[-0.5, 3.5, 0.0, 12.0]]
    table = decode(codes, scale, None, Scheme("nf4", group_size=2))
    by_hand = torch.tensor([[-0.5, 0.5 * NF4_LEVELS[8], -2.0, -2 * NF4_LEVELS[9]]])
    assert torch.allclose(table, by_hand)
    assert decode(codes, scale, None, Scheme("fp4", group_size=2))[0, 2] == pytest.approx(-2.0 * FP4_LEVELS[15])


@pytest.mark.parametrize(
    "scheme",
    [Scheme(), Scheme(symmetric=False), Scheme(bits=8), Scheme("nf4"), Scheme("nf4", double_quant=True)],
    ids=lambda s: s.label,
)
def test_tensor_round_trip_bytes_and_devices(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**scheme.bits, (8, 96), generator=generator).to(torch.uint8)
    scale = torch.randn(8, 3, generator=generator)
    zero = None if scheme.symmetric else torch.randint(0, 16, (8, 3), generator=generator).to(torch.uint8)
    tensor = QuantizedTensor.from_codes(codes, nest(scale) if scheme.double_quant else scale, zero, scheme)
    assert torch.equal(tensor.codes(), codes)
    assert tensor.nbytes == sum(t.numel() * t.element_size() for t in tensor.tensors())
    expected = decode(codes, tensor.scales(), zero, scheme)
    assert torch.equal(tensor.dequantize(), expected)
    assert torch.equal(tensor.dequantize(torch.bfloat16), expected.to(torch.bfloat16))
    moved = tensor.to("meta")
    assert moved.packed.device.type == "meta" and moved.shape == (8, 96)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: {"packed": t.packed[:, :-1]}, "packed"),
        (lambda t: {"packed": t.packed.to(torch.int32)}, "packed"),
        (lambda t: {"scale": t.scale[:, :1]}, "scale"),
        (lambda t: {"scale": t.scale.to(torch.float64)}, "scale"),
        (lambda t: {"scale": None}, "scale"),
        (lambda t: {"zero_point": torch.zeros(8, 3, dtype=torch.uint8)}, "zero_point"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Callable[[QuantizedTensor], dict[str, object]], named: str) -> None:
    good = QuantizedTensor.from_codes(torch.zeros(8, 96, dtype=torch.uint8), torch.ones(8, 3), None, Scheme())
    fields = {
        "packed": good.packed,
        "scale": good.scale,
        "zero_point": None,
        "scheme": good.scheme,
        "shape": good.shape,
    }
    with pytest.raises(FormatError, match=named):
        QuantizedTensor(**{**fields, **change(good)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "keys",
    [
        {"bits": 3},
        {"grid": "nf5"},
        {"grid": "nf4", "bits": 8},
        {"grid": "nf4", "symmetric": False},
        {"double_quant": True},
        {"group_size": 0},
    ],
)
def test_impossible_schemes_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Scheme(**keys)  # type: ignore[arg-type]


def test_bits_per_weight() -> None:
    assert Scheme(group_size=64).bits_per_weight(576) == 4.25
    assert Scheme(group_size=32, symmetric=False).bits_per_weight(576) == 4.625
    assert Scheme(bits=8, group_size=PER_CHANNEL).bits_per_weight(512) == 8.03125
    assert Scheme("nf4", group_size=64).bits_per_weight(576) == 4.5
    assert Scheme("nf4", group_size=64, double_quant=True).bits_per_weight(576) == pytest.approx(4.127, abs=1e-3)
