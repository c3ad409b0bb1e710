"""bitsandbytes 4-bit: exact round trips, the library's own bytes in both directions, and every refusal."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import bitsandbytes.functional as functional
import pytest
import torch
from bitsandbytes.nn import Params4bit

from hf_quant.errors import FormatError
from hf_quant.formats import bitsandbytes as bnb
from hf_quant.grids import PER_CHANNEL, Scheme
from hf_quant.tensor import DoubleQuant, QuantizedTensor

CASES = [
    (rows, columns, Scheme(grid, 4, True, block, nested))
    for grid in ("nf4", "fp4")
    for nested in (False, True)
    for rows, columns, block in [
        (1, 32, 32),
        (3, 96, 32),
        (7, 64, 64),
        (33, 128, PER_CHANNEL),
        (5, 2048, 1024),
        (40, 384, 128),
    ]
]
STATE = "weight.quant_state.bitsandbytes__nf4"


def label(value: object) -> str:
    return value.label if isinstance(value, Scheme) else str(value)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("rows", "columns", "scheme"), CASES, ids=label)
def test_round_trip_is_exact(rows, columns, scheme, random_tensor, same) -> None:
    tensor = random_tensor(scheme, rows, columns)
    encoded = bnb.encode(tensor, dtype=torch.bfloat16)
    assert sorted(encoded) == sorted(bnb.suffixes(scheme))
    assert all(value.is_contiguous() for value in encoded.values())
    assert same(bnb.decode(encoded, scheme), tensor)
    assert bnb.scheme_of(encoded) == replace(scheme, group_size=scheme.group(columns))
    shapes = {suffix: tuple(value.shape) for suffix, value in encoded.items()}
    assert bnb.scheme_from_shapes(shapes, columns, rows) == bnb.scheme_of(encoded)


@pytest.mark.parametrize("block", bnb.BLOCKS)
def test_every_block_size_of_the_library_is_written(block, random_tensor, same) -> None:
    scheme = Scheme("nf4", 4, True, block)
    tensor = random_tensor(scheme, 3, 8192)
    assert same(bnb.decode(bnb.encode(tensor, dtype=torch.float16), scheme), tensor)


def test_any_offset_survives_json() -> None:
    scheme = Scheme("nf4", 4, True, 32, True)
    patterns = torch.randint(-(2**31), 2**31, (4000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    for offset in [*patterns[patterns.isfinite()][:500], torch.tensor(0.0), torch.tensor(1e-45), torch.tensor(-0.0)]:
        nested = DoubleQuant(torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1), offset, torch.zeros(256))
        tensor = QuantizedTensor.from_codes(codes, nested, None, scheme)
        read = bnb.decode(bnb.encode(tensor, dtype=torch.float32), scheme)
        assert read.nested is not None and _bytes(read.nested.offset) == _bytes(offset)


# ---- the library itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "scheme"), CASES, ids=label)
def test_library_dequantizes_the_same_weights(rows, columns, scheme, dtype, random_tensor) -> None:
    tensor = random_tensor(scheme, rows, columns)
    encoded = bnb.encode(tensor, dtype=dtype)
    stats = {suffix: value for suffix, value in encoded.items() if suffix != "weight"}
    parameter = Params4bit.from_prequantized(encoded["weight"], stats, device="cpu")
    read = functional.dequantize_4bit(parameter.data, parameter.quant_state)
    assert read.dtype == dtype and torch.equal(read, tensor.dequantize(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "scheme"), CASES, ids=label)
def test_library_s_own_tensors_come_back_byte_for_byte(rows, columns, scheme, dtype) -> None:
    """quantize_4bit -> its state dict -> decode -> encode: the same bytes, json included."""
    packed, state = functional.quantize_4bit(
        (torch.randn(rows, columns) * 0.05).to(dtype),
        blocksize=scheme.group(columns),
        compress_statistics=scheme.double_quant,
        quant_type=scheme.grid,
    )
    theirs = {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    tensor = bnb.decode(theirs, scheme)
    assert torch.equal(tensor.dequantize(dtype), functional.dequantize_4bit(packed, state))
    ours = bnb.encode(tensor, dtype=dtype)
    assert set(ours) == set(theirs)
    for suffix, value in theirs.items():
        assert ours[suffix].dtype == value.dtype and ours[suffix].shape == value.shape, suffix
        assert _bytes(ours[suffix]) == _bytes(value), suffix


def test_library_writes_what_it_read_of_ours(random_tensor) -> None:
    """A stock model saved again holds the bytes that we wrote."""
    for scheme in (Scheme("nf4", 4, True, 128), Scheme("fp4", 4, True, 32, True)):
        encoded = bnb.encode(random_tensor(scheme, 9, 256), dtype=torch.bfloat16)
        stats = {suffix: value for suffix, value in encoded.items() if suffix != "weight"}
        parameter = Params4bit.from_prequantized(encoded["weight"], stats, device="cpu")
        again = {f"weight.{key}": value for key, value in parameter.quant_state.as_dict(packed=True).items()}
        assert {key: _bytes(value) for key, value in again.items()} == {
            key: _bytes(value) for key, value in encoded.items() if key != "weight"
        }


# ---- what it holds


@pytest.mark.parametrize(
    ("scheme", "kind", "shape", "reason"),
    [
        (Scheme("int", 4, True, 64), "Linear", (8, 64), "int4"),
        (Scheme("nf4", 4, True, 64), "Embedding", (8, 64), "Embedding"),
        (Scheme("nf4", 4, True, 64), "Linear", (2, 8, 64), "2-D"),
        (Scheme("nf4", 4, True, 128), "Linear", (8, 576), "straddle its rows of 576"),
        (Scheme("nf4", 4, True, 16), "Linear", (8, 64), "power of two"),
        (Scheme("nf4", 4, True, 96), "Linear", (8, 96), "power of two"),
        (Scheme("nf4", 4, True, PER_CHANNEL), "Linear", (8, 576), "power of two"),
    ],
)
def test_holds_says_why_not(scheme, kind, shape, reason) -> None:
    assert reason in (bnb.holds(scheme, kind, shape) or "")


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_holds_the_rest(kind) -> None:
    assert bnb.holds(Scheme("fp4", 4, True, PER_CHANNEL, True), kind, (3, 4096)) is None


def test_encode_refuses_what_it_cannot_hold(random_tensor) -> None:
    with pytest.raises(FormatError, match=r"layers\.0\.fc1 cannot be written: blocks of 96 are not a power of two"):
        bnb.encode(random_tensor(Scheme("nf4", 4, True, 96), 4, 96), dtype=torch.float32, name="layers.0.fc1")
    with pytest.raises(FormatError, match=r"scales are torch\.bfloat16"):
        bnb.encode(random_tensor(Scheme("nf4", 4, True, 64), 4, 64, torch.bfloat16), dtype=torch.bfloat16)
    with pytest.raises(FormatError, match=r"does not compute in torch\.float64"):
        bnb.encode(random_tensor(Scheme("nf4", 4, True, 64), 4, 64), dtype=torch.float64)


# ---- malformed tensors


def _library_tensors(rows: int, columns: int, block: int) -> dict[str, torch.Tensor]:
    packed, state = functional.quantize_4bit(torch.randn(rows, columns), blocksize=block, quant_type="nf4")
    return {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}


@pytest.mark.parametrize(("rows", "columns", "block"), [(8, 576, 128), (9, 576, 128), (3, 33, 64), (5, 96, 64)])
def test_straddling_blocks_are_refused_with_the_reason(rows, columns, block) -> None:
    tensors = _library_tensors(rows, columns, block)
    message = (
        rf"quant_state.bitsandbytes__nf4: blocks of {block} straddle its rows of {columns}, which bitsandbytes' own"
    )
    with pytest.raises(FormatError, match=message):
        bnb.decode(tensors, Scheme("nf4", 4, True, block), name="fc1")
    with pytest.raises(FormatError, match=message):
        bnb.scheme_of(tensors)
    shapes = {suffix: tuple(value.shape) for suffix, value in tensors.items()}
    with pytest.raises(FormatError, match=r"straddle|power of two"):
        bnb.scheme_from_shapes(shapes, columns, rows)


def _state(**changes: Any) -> torch.Tensor:
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": 32,
        "dtype": "bfloat16",
        "shape": [8, 64],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.5,
    }
    state.update(changes)
    return _text(json.dumps({key: value for key, value in state.items() if value != "absent"}))


def _text(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode("latin-1")), dtype=torch.uint8)


ABSENT = None
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"weight": ABSENT}, "weight is missing"),
    ({"weight": torch.zeros(256, 1, dtype=torch.int8)}, "weight is int8 [256, 1], expected uint8 [256, 1]"),
    ({"weight": torch.zeros(255, 1, dtype=torch.uint8)}, "weight is uint8 [255, 1]"),
    ({"weight": torch.zeros(1, 256, dtype=torch.uint8)}, "weight is uint8 [1, 256]"),
    ({"weight": torch.zeros(8, 32, dtype=torch.uint8)}, "weight is uint8 [8, 32]"),
    ({"weight.absmax": ABSENT}, "weight.absmax is missing"),
    ({"weight.absmax": torch.zeros(16)}, "weight.absmax is float32 [16], expected uint8 [16]"),
    ({"weight.absmax": torch.zeros(15, dtype=torch.uint8)}, "weight.absmax is uint8 [15]"),
    ({"weight.nested_absmax": torch.zeros(2)}, "weight.nested_absmax is float32 [2], expected float32 [1]"),
    ({"weight.nested_absmax": torch.tensor([float("inf")])}, "weight.nested_absmax holds NaN or Inf"),
    ({"weight.nested_quant_map": ABSENT}, "weight.nested_quant_map is missing"),
    ({"weight.nested_quant_map": torch.zeros(16)}, "weight.nested_quant_map is float32 [16]"),
    ({"weight.quant_map": ABSENT}, "weight.quant_map is missing"),
    ({"weight.quant_map": torch.zeros(16)}, "weight.quant_map is not the table of nf4"),
    ({"weight.quant_map": torch.zeros(16, dtype=torch.float64)}, "weight.quant_map is float64"),
    ({"weight.g_idx": torch.zeros(16)}, "weight.g_idx is not a tensor of bitsandbytes"),
    ({"weight.SCB": torch.zeros(16)}, "weight.SCB is not a tensor of bitsandbytes"),
    ({STATE: ABSENT}, STATE + " is missing"),
    ({"weight.quant_state.bitsandbytes__fp4": _state()}, STATE + " is there twice"),
    ({STATE: _state().to(torch.int32)}, STATE + " is int32"),
    ({STATE: _text("not json")}, STATE + " is not json"),
    ({STATE: _text("{")}, STATE + " is not json"),
    ({STATE: _text("\xff\xfe")}, STATE + " is not json"),
    ({STATE: _text("[" * 100_000)}, STATE + " is not json"),
    ({STATE: _text("[]")}, STATE + " does not have the keys"),
    ({STATE: _state(shape="absent")}, STATE + " does not have the keys"),
    ({STATE: _state(extra=1)}, STATE + " does not have the keys"),
    ({STATE: _state(nested_offset="absent")}, STATE + " does not have the keys"),
    ({"weight.nested_absmax": ABSENT}, STATE + " does not have the keys"),
    ({STATE: _state(quant_type="fp4")}, STATE + " has quant_type='fp4'"),
    ({STATE: _state(blocksize="64")}, STATE + " has blocksize='64'"),
    ({STATE: _state(blocksize=True)}, STATE + " has blocksize=True"),
    ({STATE: _state(blocksize=0)}, STATE + ": blocks of 0"),
    ({STATE: _state(blocksize=48)}, STATE + ": blocks of 48"),
    ({STATE: _state(blocksize=64)}, STATE + " holds nf4 g64 dq, expected nf4 g32 dq"),
    ({STATE: _state(dtype="int8")}, STATE + " has dtype='int8'"),
    ({STATE: _state(dtype=["float32"])}, STATE + " has dtype="),
    ({STATE: _state(shape=[8])}, STATE + " has shape=[8]"),
    ({STATE: _state(shape=[8, -64])}, STATE + " has shape=[8, -64]"),
    ({STATE: _state(shape=[8, 64.0])}, STATE + " has shape=[8, 64.0]"),
    ({STATE: _state(shape=None)}, STATE + " has shape=None"),
    ({STATE: _state(shape=[16, 64])}, "weight is uint8 [256, 1], expected uint8 [512, 1]"),
    ({STATE: _state(nested_blocksize=128)}, STATE + " nests its scales as [128,"),
    ({STATE: _state(nested_dtype="float16")}, STATE + " nests its scales as"),
    ({STATE: _state(nested_offset=float("nan"))}, STATE + " nests its scales as"),
    ({STATE: _state(nested_offset=float("inf"))}, STATE + " nests its scales as"),
    ({STATE: _state(nested_offset="0.5")}, STATE + " nests its scales as"),
    ({STATE: _state(nested_offset=1e300)}, STATE + " nests its scales as"),
]


@pytest.mark.parametrize(("changes", "named"), BROKEN, ids=[f"{i}-{named[:60]}" for i, (_, named) in enumerate(BROKEN)])
def test_malformed_tensors_are_named(changes, named, random_tensor) -> None:
    scheme = Scheme("nf4", 4, True, 32, True)
    tensors = bnb.encode(random_tensor(scheme, 8, 64), dtype=torch.bfloat16)
    assert bnb.decode({**tensors, STATE: _state()}, scheme).shape == (8, 64)
    tensors = {key: value for key, value in {**tensors, **changes}.items() if value is not ABSENT}
    with pytest.raises(FormatError, match="^" + re.escape("layers.0.fc1." + named)):
        bnb.decode(tensors, scheme, name="layers.0.fc1")


def test_plain_scales_are_checked(random_tensor) -> None:
    scheme = Scheme("fp4", 4, True, 32)
    encoded = bnb.encode(random_tensor(scheme, 8, 64), dtype=torch.bfloat16)
    with pytest.raises(FormatError, match="absmax holds NaN or Inf"):
        bnb.decode({**encoded, "weight.absmax": torch.full((16,), float("nan"))}, scheme)
    with pytest.raises(FormatError, match=r"absmax is uint8 \[16\], expected float32"):
        bnb.decode({**encoded, "weight.absmax": torch.zeros(16, dtype=torch.uint8)}, scheme)
    for other in (replace(scheme, grid="nf4"), replace(scheme, group_size=64), replace(scheme, double_quant=True)):
        with pytest.raises(FormatError, match="holds fp4 g32, expected"):
            bnb.decode(encoded, other)
    with pytest.raises(FormatError, match="holds fp4 g32, expected int4"):
        bnb.decode(encoded, Scheme("int", 4, True, 32))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"weight": (256, 1), "weight.absmax": (16,)}, "incomplete"),
        ({"weight": (256, 1), STATE: (90,)}, "incomplete"),
        ({"weight": (256, 1), STATE: (90,), "weight.absmax": (0,)}, "blocks of 0"),
        ({"weight": (256, 1), STATE: (90,), "weight.absmax": (15,)}, "power of two"),
    ],
)
def test_shapes_that_fit_no_scheme_are_refused(shapes, message) -> None:
    with pytest.raises(FormatError, match=message):
        bnb.scheme_from_shapes(shapes, 64, 8, name="fc1")


def test_shapes_of_a_float_weight_have_no_scheme() -> None:
    assert bnb.scheme_from_shapes({"weight": (8, 64), "bias": (8,)}, 64, 8) is None
