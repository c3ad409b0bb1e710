"""GPTQ: the layout read by a tiny reader written from its description, exact round trips, act-order, every refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_quant.errors import FormatError
from hf_quant.formats import gptq
from hf_quant.grids import PER_CHANNEL, Scheme

VERSIONS = [gptq.V1, gptq.V2]
SCHEMES = [
    Scheme("int", bits, symmetric, group)
    for bits in (4, 8)
    for symmetric in (True, False)
    for group in (8, 32, PER_CHANNEL)
]
OPT = "model.decoder.layers.{}.{}"


def _ids(value: object) -> str | None:
    return value.label if isinstance(value, Scheme) else getattr(value, "NAME", None)


def _reordered(tensor: Any, seed: int = 1) -> Any:
    """The same codes and scales, with their columns somewhere else: sorted inside of groups, as act-order leaves it."""
    columns, group = tensor.shape[1], tensor.scheme.group(tensor.shape[1])
    places = torch.randperm(columns, generator=torch.Generator().manual_seed(seed)).view(-1, group)
    return replace(tensor, order=places.sort(dim=1).values.reshape(-1).to(torch.int32))


def read_module(tensors: dict[str, torch.Tensor], bits: int, version: int) -> torch.Tensor:
    """float64 ``[in, out]``, one weight at a time: fields of 32-bit words, group of a column by g_idx."""
    fields_per_word, mask = 32 // bits, (1 << bits) - 1
    columns, rows = tensors["g_idx"].shape[0], tensors["qweight"].shape[1]
    weight = torch.empty(columns, rows, dtype=torch.float64)
    for i in range(columns):
        group = int(tensors["g_idx"][i])
        zero_words = [int(word) & 0xFFFFFFFF for word in tensors["qzeros"][group]]
        if version == 1:  # one is added to every field of a word at once, as GPTQModel does
            zero_words = [(word + sum(1 << s for s in range(0, 32, bits))) & 0xFFFFFFFF for word in zero_words]
        for o in range(rows):
            code = (int(tensors["qweight"][i // fields_per_word, o]) >> (bits * (i % fields_per_word))) & mask
            zero = (zero_words[o // fields_per_word] >> (bits * (o % fields_per_word))) & mask
            weight[i, o] = (code - zero) * float(tensors["scales"][group, o])
    return weight


@pytest.mark.parametrize("version", VERSIONS, ids=_ids)
@pytest.mark.parametrize("reorder", [False, True], ids=["in-place", "act-order"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=_ids)
def test_the_layout_is_the_one_described(scheme, reorder, version, random_tensor, same) -> None:
    tensor = random_tensor(scheme, 16, 64, torch.float16)
    if reorder and scheme.group_size != PER_CHANNEL:
        tensor = _reordered(tensor)
    encoded = version.encode(tensor, dtype=torch.float16, name="fc")
    assert tuple(encoded) == version.SUFFIXES and all(value.is_contiguous() for value in encoded.values())
    per_word, groups = 32 // scheme.bits, scheme.groups(64)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in encoded.items()} == {
        "qweight": (torch.int32, (64 // per_word, 16)),
        "qzeros": (torch.int32, (groups, 16 // per_word)),
        "scales": (torch.float16, (groups, 16)),
        "g_idx": (torch.int32, (64,)),
    }
    found = read_module(encoded, scheme.bits, 1 if version is gptq.V1 else 2)
    assert torch.equal(found.t().float(), tensor.dequantize())
    decoded = version.decode(encoded, scheme, name="fc")
    assert same(decoded, tensor)
    assert (decoded.order is None) == (tensor.order is None)


def test_version_1_borrows_as_its_writer_does(random_tensor) -> None:
    scheme = Scheme("int", 4, False, 32)
    tensor = random_tensor(scheme, 8, 32, torch.float16)
    tensor.zero_point[:] = torch.tensor([0, 1, 0, 15, 8, 0, 0, 3], dtype=torch.uint8)[:, None]
    word = int(gptq.V1.encode(tensor, dtype=torch.float16)["qzeros"][0, 0]) & 0xFFFFFFFF
    assert word == (sum(z << (4 * i) for i, z in enumerate((0, 1, 0, 15, 8, 0, 0, 3))) - 0x11111111) & 0xFFFFFFFF
    symmetric = random_tensor(Scheme("int", 4, True, 32), 8, 32, torch.float16)
    assert int(gptq.V1.encode(symmetric, dtype=torch.float16)["qzeros"][0, 0]) == 0x77777777


@pytest.mark.parametrize("version", VERSIONS, ids=_ids)
def test_the_tensors_say_whether_they_are_symmetric_and_reordered(version, random_tensor) -> None:
    scheme = Scheme("int", 4, True, 32)
    tensor = random_tensor(scheme, 16, 64, torch.float16)
    claimed = replace(scheme, symmetric=False)

    def refined(of: Any) -> Any:
        return version.refine(claimed, version.encode(of, dtype=torch.float16).__getitem__, (16, 64), "fc")

    assert refined(tensor) == (scheme, False)
    assert refined(_reordered(tensor)) == (scheme, True)
    assert refined(random_tensor(claimed, 16, 64, torch.float16)) == (claimed, False)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ({"qweight": None}, "fc.qweight is missing"),
        ({"qzeros": torch.zeros(3, 2, dtype=torch.int32)}, r"fc.qzeros is int32 \[3, 2\]"),
        ({"scales": torch.full((2, 16), float("nan"), dtype=torch.float16)}, "fc.scales holds NaN"),
        ({"g_idx": torch.zeros(64, dtype=torch.int32)}, "fc.g_idx does not put 32 columns into each of 2 groups"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, "fc.g_idx does not put 32 columns"),
        ({"other": torch.zeros(1)}, "fc.other is not a tensor of gptq"),
        ({"qzeros": torch.zeros(2, 2, dtype=torch.int32)}, "fc.qzeros has zero points other than 8"),
    ],
    ids=str,
)
def test_damaged_modules_are_named(damage, match, random_tensor) -> None:
    scheme = Scheme("int", 4, True, 32)
    encoded = gptq.V1.encode(random_tensor(scheme, 16, 64, torch.float16), dtype=torch.float16)
    broken = {name: value for name, value in {**encoded, **damage}.items() if value is not None}
    with pytest.raises(FormatError, match=match):
        gptq.V1.decode(broken, scheme, name="fc")


@pytest.mark.parametrize(
    ("scheme", "kind", "shape", "match"),
    [
        (Scheme("nf4", 4, True, 64), "Linear", (8, 64), "not nf4"),
        (Scheme("int", 4, True, 32), "Embedding", (8, 64), "not Embedding"),
        (Scheme("int", 4, True, 32), "Linear", (8, 48), "does not divide rows of 48"),
        (Scheme("int", 4, True, 32), "Linear", (12, 64), "8 codes into a word"),
        (Scheme("int", 4, True, 12), "Linear", (8, 12), "8 codes into a word"),
    ],
)
def test_what_it_does_not_hold(scheme, kind, shape, match) -> None:
    assert match in str(gptq.V1.holds(scheme, kind, shape))


@pytest.mark.parametrize(
    "change", [{"bits": 3}, {"group_size": 0}, {"backend": "marlin"}, {"dynamic": {"-:x": {}}}], ids=str
)
def test_configs_beyond_us(change) -> None:
    with pytest.raises(FormatError, match=next(iter(change))):
        gptq.V1.read_config({"quant_method": "gptq", "bits": 4, "group_size": 128, **change})


def _plan(plan_of, **schemes: Any) -> Any:
    layers = {OPT.format(i, name): ("Linear", (16, 64), scheme) for i in range(2) for name, scheme in schemes.items()}
    return plan_of({**layers, "lm_head": ("Linear", (96, 64), None)})


def test_the_config_says_what_is_quantized(plan_of) -> None:
    int4 = Scheme("int", 4, True, 32)
    config = gptq.V1.quantization_config(_plan(plan_of, fc1=int4, fc2=int4))
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, True, False)
    assert config["modules_in_block_to_quantize"] is None and config["checkpoint_format"] == "gptq"
    assert gptq.V1.read_config(config)("model.decoder.layers.1.fc1", 64, 16) == int4
    some = gptq.V2.quantization_config(_plan(plan_of, fc1=int4, fc2=None))
    assert some["modules_in_block_to_quantize"] == [["fc1"]] and some["checkpoint_format"] == "gptq_v2"
    asymmetric = gptq.V1.quantization_config(_plan(plan_of, fc1=int4, fc2=replace(int4, symmetric=False)))
    assert asymmetric["sym"] is False


def test_a_config_that_could_not_say_it_is_refused(plan_of) -> None:
    int4 = Scheme("int", 4, True, 32)
    with pytest.raises(FormatError, match=r"fc2 is int8 sym g32 and .*fc1 is int4 sym g32"):
        gptq.V1.quantization_config(_plan(plan_of, fc1=int4, fc2=replace(int4, bits=8)))
    with pytest.raises(FormatError, match="lm_head is in no block"):
        gptq.V1.quantization_config(plan_of({"lm_head": ("Linear", (96, 64), int4)}))
    layers = {OPT.format(0, "fc1"): ("Linear", (16, 64), int4), OPT.format(1, "fc1"): ("Linear", (16, 64), None)}
    with pytest.raises(FormatError, match=r"layers\.1\.fc1 is left in float"):
        gptq.V1.quantization_config(plan_of(layers))
