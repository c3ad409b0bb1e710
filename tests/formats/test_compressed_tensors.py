"""compressed-tensors: exact round trips, the library's own bytes, its own matching rules, and every refusal."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import nn

from hf_quant.errors import FormatError
from hf_quant.formats import compressed_tensors as ct
from hf_quant.grids import PER_CHANNEL, Scheme

SHAPES = [(1, 1), (3, 7), (5, 30), (8, 64), (13, 96), (32, 128), (33, 160)]


def _schemes(columns: int) -> list[Scheme]:
    groups = [group for group in (5, 16, 32, 64, PER_CHANNEL) if group == PER_CHANNEL or columns % group == 0]
    return [Scheme("int", bits, sym, group) for bits, sym, group in itertools.product((4, 8), (True, False), groups)]


CASES = [(rows, columns, scheme) for rows, columns in SHAPES for scheme in _schemes(columns)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "scheme"), CASES, ids=lambda v: v.label if isinstance(v, Scheme) else str(v)
)
def test_round_trip_is_exact(rows, columns, scheme, dtype, random_tensor, same) -> None:
    tensor = random_tensor(scheme, rows, columns, dtype)
    encoded = ct.encode(tensor)
    assert tuple(sorted(encoded)) == tuple(sorted(ct.suffixes(scheme)))
    assert all(value.is_contiguous() for value in encoded.values())
    assert same(ct.decode(encoded, scheme), tensor)


def test_whole_words_share_memory(random_tensor) -> None:
    tensor = random_tensor(Scheme("int", 4, True, 32), 16, 64)
    encoded = ct.encode(tensor)
    assert encoded["weight_packed"].data_ptr() == tensor.packed.data_ptr()
    assert ct.decode(encoded, tensor.scheme).packed.data_ptr() == tensor.packed.data_ptr()


def test_codes_that_start_between_words_are_written(random_tensor, same) -> None:
    scheme = Scheme("int", 8, True, 4)
    tensor = random_tensor(scheme, 4, 8)
    misplaced = torch.empty(33, dtype=torch.uint8)[1:].view(4, 8).copy_(tensor.packed)
    moved = type(tensor)(misplaced, tensor.scale, None, scheme, (4, 8))
    assert same(ct.decode(ct.encode(moved), scheme), tensor)


# ---- the library itself


def _library_scheme(scheme: Scheme) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**ct._weights(scheme)))


@pytest.mark.parametrize(
    ("rows", "columns", "scheme"), CASES, ids=lambda v: v.label if isinstance(v, Scheme) else str(v)
)
def test_library_reads_and_writes_the_same_bytes(rows, columns, scheme, random_tensor) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor as Library

    tensor = random_tensor(scheme, rows, columns)
    encoded = ct.encode(tensor)
    read = Library.decompress(dict(encoded), _library_scheme(scheme))
    assert torch.equal(read["weight"], tensor.dequantize())
    state = {"weight": tensor.dequantize(), "weight_scale": tensor.scales()}
    if tensor.zero_point is not None:
        state["weight_zero_point"] = (tensor.zero_point.int() - scheme.implied_zero_point).to(torch.int8)
    written = Library.compress(state, _library_scheme(scheme))
    assert set(written) == set(encoded)
    for suffix, value in written.items():
        assert value.dtype == encoded[suffix].dtype
        assert torch.equal(value, encoded[suffix]), suffix


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_library_dequantizes_half_precision_scales_as_we_round_once(bits, symmetric, dtype, random_tensor) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor as Library

    scheme = Scheme("int", bits, symmetric, 32)
    tensor = random_tensor(scheme, 24, 64, dtype)
    read = Library.decompress(dict(ct.encode(tensor)), _library_scheme(scheme))["weight"]
    assert read.dtype == dtype and torch.equal(read, tensor.dequantize(dtype))


def test_library_leaves_conv1d_alone_so_we_refuse_it() -> None:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"fc": nn.Linear(32, 32), "conv": Conv1D(32, 32)})
    group = {"targets": ["Linear", "Conv1D", "conv"], "weights": ct._weights(Scheme())}
    config = QuantizationConfig(config_groups={"group_0": group}, format="pack-quantized")
    apply_quantization_config(model, config, show_progress=False)
    assert hasattr(model["fc"], "quantization_scheme") and not hasattr(model["conv"], "quantization_scheme")
    assert "Conv1D" in (ct.holds(Scheme(), "Conv1D", (32, 32)) or "")


# ---- what it holds


@pytest.mark.parametrize(
    ("scheme", "kind", "shape", "reason"),
    [
        (Scheme("nf4", 4, True, 64), "Linear", (8, 64), "nf4"),
        (Scheme(), "Conv2d", (8, 64), "Conv2d"),
        (Scheme(), "Linear", (8, 8, 32), "2-D"),
        (Scheme("int", 4, True, 128), "Linear", (8, 576), "does not divide"),
    ],
)
def test_holds_says_why_not(scheme, kind, shape, reason) -> None:
    assert reason in (ct.holds(scheme, kind, shape) or "")


def test_holds_the_rest() -> None:
    assert ct.holds(Scheme("int", 8, False, PER_CHANNEL), "Linear", (3, 7)) is None


def test_encode_refuses_what_it_cannot_hold(random_tensor) -> None:
    with pytest.raises(FormatError, match=r"layers\.0\.fc1 cannot be written.*nf4"):
        ct.encode(random_tensor(Scheme("nf4", 4, True, 32), 4, 32), dtype=torch.float32, name="layers.0.fc1")


# ---- malformed tensors


def _broken(encoded: dict[str, torch.Tensor], change: str) -> dict[str, torch.Tensor]:
    tensors = dict(encoded)
    packed, scale, zeros = tensors["weight_packed"], tensors["weight_scale"], tensors["weight_zero_point"]
    changes: dict[str, dict[str, torch.Tensor | None]] = {
        "packed dtype": {"weight_packed": packed.to(torch.int64)},
        "packed short": {"weight_packed": packed[:, :-1]},
        "packed rows": {"weight_packed": packed[:-1]},
        "packed flat": {"weight_packed": packed.reshape(-1)},
        "packed missing": {"weight_packed": None},
        "scale missing": {"weight_scale": None},
        "scale shape": {"weight_scale": scale[:, :1]},
        "scale dtype": {"weight_scale": scale.double()},
        "scale nan": {"weight_scale": scale.clone().fill_(float("nan"))},
        "zeros missing": {"weight_zero_point": None},
        "zeros unpacked": {"weight_zero_point": torch.zeros(scale.shape, dtype=torch.int8)},
        "zeros short": {"weight_zero_point": zeros[:-1]},
        "shape missing": {"weight_shape": None},
        "shape long": {"weight_shape": torch.tensor([8, 64, 1])},
        "shape float": {"weight_shape": torch.tensor([8.0, 64.0])},
        "shape wrong": {"weight_shape": torch.tensor([8, 63])},
        "shape other": {"weight_shape": torch.tensor([16, 32])},
        "shape empty": {"weight_shape": torch.tensor([0, 64])},
        "shape negative": {"weight_shape": torch.tensor([-8, 64])},
        "unknown": {"weight_g_idx": torch.zeros(64, dtype=torch.int32)},
    }
    for key, value in changes[change].items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    return tensors


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("packed dtype", "weight_packed is int64"),
        ("packed short", "weight_packed is int32 [8, 7], expected int32 [8, 8]"),
        ("packed rows", "weight_packed is int32 [7, 8]"),
        ("packed flat", "weight_packed is int32 [64]"),
        ("packed missing", "weight_packed is missing"),
        ("scale missing", "weight_scale is missing"),
        ("scale shape", "weight_scale is float32 [8, 1], expected"),
        ("scale dtype", "weight_scale is float64"),
        ("scale nan", "weight_scale holds NaN"),
        ("zeros missing", "weight_zero_point is missing"),
        ("zeros unpacked", "weight_zero_point is int8 [8, 2], expected int32 [1, 2]"),
        ("zeros short", "weight_zero_point is int32 [0, 2]"),
        ("shape missing", "weight_shape is missing"),
        ("shape long", "weight_shape is int64 [3]"),
        ("shape float", "weight_shape is float32"),
        ("shape wrong", "weight_shape is [8, 63]: group_size=32 does not divide rows of 63"),
        ("shape other", "weight_packed is int32 [8, 8], expected int32 [16, 4]"),
        ("shape empty", "weight_shape is [0, 64]"),
        ("shape negative", "weight_shape is [-8, 64]"),
        ("unknown", "weight_g_idx is not a tensor of compressed-tensors"),
    ],
)
def test_malformed_tensors_are_named(change, named, random_tensor) -> None:
    scheme = Scheme("int", 4, False, 32)
    tensors = _broken(ct.encode(random_tensor(scheme, 8, 64)), change)
    with pytest.raises(FormatError, match=re.escape("layers.0.fc1." + named)):
        ct.decode(tensors, scheme, name="layers.0.fc1")


def test_zero_points_on_a_symmetric_scheme_are_refused(random_tensor) -> None:
    encoded = ct.encode(random_tensor(Scheme("int", 4, False, 32), 8, 64))
    with pytest.raises(FormatError, match="weight_zero_point is there, but the scheme is int4 sym g32"):
        ct.decode(encoded, Scheme("int", 4, True, 32))


def test_another_scheme_is_refused(random_tensor) -> None:
    encoded = ct.encode(random_tensor(Scheme("int", 4, True, 32), 8, 64))
    for other in (Scheme("int", 8, True, 32), Scheme("int", 4, True, 16), Scheme("int", 4, False, 32), Scheme("nf4")):
        with pytest.raises(FormatError):
            ct.decode(encoded, other)


@pytest.mark.parametrize("columns", [5, 7])
def test_stray_padding_does_not_enter_the_codes(columns, random_tensor, same) -> None:
    scheme = Scheme("int", 4, True, PER_CHANNEL)
    tensor = random_tensor(scheme, 4, columns)
    encoded = ct.encode(tensor)
    encoded["weight_packed"] = encoded["weight_packed"] | (0xF << 28) - (1 << 32)
    assert same(ct.decode(encoded, scheme), tensor)
