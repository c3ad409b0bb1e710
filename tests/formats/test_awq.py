"""AWQ: the layout read by a tiny reader written from its description, exact round trips, every refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_quant.errors import FormatError
from hf_quant.formats import awq
from hf_quant.grids import PER_CHANNEL, Scheme

SCHEMES = [Scheme("int", 4, symmetric, group) for symmetric in (True, False) for group in (8, 32, PER_CHANNEL)]


def read_module(tensors: dict[str, torch.Tensor], group: int) -> torch.Tensor:
    """float64 ``[in, out]``, one weight at a time: column o lies in the nibble that the interleaving puts it into."""
    nibble_of = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}
    columns, rows = tensors["qweight"].shape[0], tensors["scales"].shape[1]
    weight = torch.empty(columns, rows, dtype=torch.float64)
    for i in range(columns):
        for o in range(rows):
            shift = 4 * nibble_of[o % 8]
            code = (int(tensors["qweight"][i, o // 8]) >> shift) & 15
            zero = (int(tensors["qzeros"][i // group, o // 8]) >> shift) & 15
            weight[i, o] = (code - zero) * float(tensors["scales"][i // group, o])
    return weight


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_the_layout_is_the_one_described(scheme, random_tensor, same) -> None:
    tensor = random_tensor(scheme, 24, 64, torch.float16)
    encoded = awq.encode(tensor, dtype=torch.float16)
    assert tuple(encoded) == awq.SUFFIXES and all(value.is_contiguous() for value in encoded.values())
    assert torch.equal(read_module(encoded, scheme.group(64)).t().float(), tensor.dequantize())
    assert same(awq.decode(encoded, scheme), tensor)
    claimed = replace(scheme, symmetric=False)
    assert awq.refine(claimed, encoded.__getitem__, (24, 64), "fc") == (scheme, False)


def test_what_it_does_not_hold(random_tensor) -> None:
    int4 = Scheme("int", 4, True, 32)
    for scheme, kind, shape, match in (
        (replace(int4, bits=8), "Linear", (8, 64), "not int8"),
        (int4, "Conv1D", (8, 64), "not Conv1D"),
        (int4, "Linear", (8, 48), "does not divide rows of 48"),
        (int4, "Linear", (12, 64), "8 output columns"),
    ):
        assert match in str(awq.holds(scheme, kind, shape))
    order = torch.arange(64, dtype=torch.int32).flip(0)
    with pytest.raises(FormatError, match="fc cannot be written: its columns are reordered"):
        awq.encode(replace(random_tensor(int4, 8, 64, torch.float16), order=order), dtype=torch.float16, name="fc")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ({"qweight": None}, "fc.qweight is missing"),
        ({"qzeros": torch.zeros(3, 2, dtype=torch.int32)}, r"fc.qzeros is int32 \[3, 2\]"),
        ({"scales": torch.full((2, 16), float("inf"), dtype=torch.float16)}, "fc.scales holds NaN or Inf"),
        ({"qzeros": torch.zeros(2, 2, dtype=torch.int32)}, "fc.qzeros has zero points other than 8"),
    ],
    ids=str,
)
def test_damaged_modules_are_named(damage, match, random_tensor) -> None:
    scheme = Scheme("int", 4, True, 32)
    encoded = awq.encode(random_tensor(scheme, 16, 64, torch.float16), dtype=torch.float16)
    broken = {name: value for name, value in {**encoded, **damage}.items() if value is not None}
    with pytest.raises(FormatError, match=match):
        awq.decode(broken, scheme, name="fc")


def test_configs(plan_of) -> None:
    asymmetric = Scheme("int", 4, False, 64)
    name = "model.layers.0.mlp.{}"
    layers = {
        name.format("up_proj"): ("Linear", (16, 64), asymmetric),
        name.format("gate"): ("Linear", (16, 64), None),
        "lm_head": ("Linear", (96, 64), None),
    }
    config = awq.quantization_config(plan_of(layers))
    assert (config["bits"], config["group_size"], config["zero_point"], config["version"]) == (4, 64, True, "gemm")
    assert config["modules_to_not_convert"] == [name.format("gate"), "lm_head"]
    assert awq.read_config(config)(name.format("up_proj"), 64, 16) == asymmetric
    for change in ({"version": "gemv"}, {"bits": 8}, {"backend": "exllama"}):
        with pytest.raises(FormatError, match=next(iter(change.values())) if "bits" not in change else "bits"):
            awq.read_config({**config, **change})
    with pytest.raises(FormatError, match="lm_head is in no block"):
        awq.quantization_config(plan_of({"lm_head": ("Linear", (96, 64), asymmetric)}))
