"""The native library through its C ABI, every variant against float64."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quant.grids import PER_CHANNEL, Scheme, decode
from hf_quant.tensor import pack_codes

_SPEC = importlib.util.spec_from_file_location("native_library", Path(__file__).with_name("native_library.py"))
assert _SPEC is not None and _SPEC.loader is not None
native_library = importlib.util.module_from_spec(_SPEC)
sys.modules["native_library"] = native_library  # dataclasses look their module up there
_SPEC.loader.exec_module(native_library)

from native_library import (  # noqa: E402
    DTYPES,
    EXACT,
    INT8,
    assert_product,
    from_tensors,
    int8_activations,
    linear,
    load,
    make,
    pointer,
)

VARIANTS = ("avx512", "avx2", "portable")
SCHEMES = {
    "int4": Scheme(bits=4),
    "int4 asym": Scheme(bits=4, symmetric=False),
    "int8": Scheme(bits=8),
    "int8 asym": Scheme(bits=8, symmetric=False),
    "nf4": Scheme(grid="nf4"),
    "fp4": Scheme(grid="fp4"),
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load()


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Iterator[str]:
    if library.hfq_set_variant(request.param.encode()) != 0:
        pytest.skip(f"this CPU cannot run {request.param}")
    yield request.param
    assert library.hfq_set_variant(None) == 0


def scheme(name: str, group: int) -> Scheme:
    base = SCHEMES[name]
    return Scheme(grid=base.grid, bits=base.bits, symmetric=base.symmetric, group_size=group)


def activations(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


SHAPES = st.tuples(
    st.sampled_from([1, 15, 16, 17, 33, 70]),
    st.sampled_from([(8, 8), (16, 8), (96, 32), (192, 64), (384, 128), (288, 96), (512, 256), (20, -1), (36, -1),
                     (1, -1), (264, -1), (320, -1), (576, 576)]),
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=SHAPES,
    name=st.sampled_from(list(SCHEMES)),
    rows=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 33]),
    dtype=st.sampled_from(list(DTYPES)),
    scale_type=st.sampled_from(list(DTYPES)),
    mode=st.sampled_from([EXACT, INT8]),
    threads=st.sampled_from([1, 2]),
    with_bias=st.booleans(),
    gap=st.sampled_from([0, 1, 8]),
    native=st.sampled_from(VARIANTS),
)
def test_products_match_float64(
    library: ctypes.CDLL, shape, name, rows, dtype, scale_type, mode, threads, with_bias, gap, native
) -> None:
    if library.hfq_set_variant(native.encode()) != 0:
        return  # the parametrized tests below report a variant that this CPU lacks
    out, (columns, group) = shape
    case = make(library, scheme(name, group), out, columns, scale_type)
    x = activations(rows, columns + gap, dtype)[:, :columns]
    bias = torch.randn(out).to(dtype) if with_bias else None
    (y,) = linear([case], x, [bias], mode, threads)
    seen = int8_activations(x, case.weight.group) if mode == INT8 and case.scheme.grid == "int" else x
    assert_product(y, seen, case, bias)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("rows", [1, 8, 30])
def test_every_variant_runs_every_grid(variant: str, library: ctypes.CDLL, name: str, rows: int) -> None:
    case = make(library, scheme(name, 64), 40, 256, torch.bfloat16)
    for dtype in DTYPES:
        x = activations(rows, 256, dtype)
        assert_product(linear([case], x)[0], x, case)
        seen = int8_activations(x, 64) if case.scheme.grid == "int" else x
        assert_product(linear([case], x, mode=INT8)[0], seen, case)


def test_weights_share_activations_whatever_their_layout(variant: str, library: ctypes.CDLL) -> None:
    cases = [
        make(library, scheme(name, group), out, 384, seed=i)
        for i, (name, group, out) in enumerate(
            [("int4", 64, 48), ("int4 asym", 64, 17), ("int8", 64, 33), ("int4 asym", 128, 16), ("nf4", 64, 5),
             ("int8 asym", PER_CHANNEL, 64)]
        )
    ]  # fmt: skip
    for mode, threads, rows in ((EXACT, 1, 1), (EXACT, 2, 3), (INT8, 2, 1), (INT8, 1, 20), (EXACT, 2, 20)):
        x = activations(rows, 384)
        biases = [torch.randn(case.weight.out).bfloat16() if i % 2 else None for i, case in enumerate(cases)]
        for case, y, bias in zip(cases, linear(cases, x, biases, mode, threads), biases, strict=True):
            seen = int8_activations(x, case.weight.group) if mode == INT8 and case.scheme.grid == "int" else x
            assert_product(y, seen, case, bias)


@pytest.mark.parametrize("mode", [EXACT, INT8])
@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_nan_and_infinity_stay_apart(
    variant: str, library: ctypes.CDLL, mode: int, rows: int, dtype: torch.dtype
) -> None:
    case = make(library, scheme("int4", 32), 20, 64)
    clean = activations(rows, 64, dtype)
    broken = clean.clone()
    broken[0, 3], broken[1, 40] = torch.nan, torch.inf
    y, expected = linear([case], broken, mode=mode)[0], linear([case], clean, mode=mode)[0]
    assert not y[:2].isfinite().any()
    assert torch.equal(y[2:], expected[2:])


def test_zero_scales_give_zeros(variant: str, library: ctypes.CDLL) -> None:
    codes = torch.randint(0, 16, (18, 64), dtype=torch.uint8)
    scale = torch.full((18, 2), 0.01)
    scale[3:] = 0.0
    case = from_tensors(library, scheme("int4", 32), codes, scale, None)
    for mode in (EXACT, INT8):
        for rows in (1, 20):
            y = linear([case], activations(rows, 64), mode=mode)[0]
            assert (y[:, 3:] == 0).all() and (y[:, :3] != 0).all()


def test_denormal_numbers_count_as_zero_at_worst(variant: str, library: ctypes.CDLL) -> None:
    case = make(library, scheme("int4", 32), 16, 64)
    x = torch.full((2, 64), 1e-40)
    x[1] = activations(1, 64, torch.float32)[0]
    x[1, :32] = 1e-39
    for mode in (EXACT, INT8):
        y = linear([case], x, mode=mode)[0]
        assert (y[0].abs() <= 1e-37).all()
        seen = int8_activations(x[1:], 32) if mode == INT8 else x[1:]
        assert_product(y[1:], seen, case)


def test_zero_activations_give_the_bias(variant: str, library: ctypes.CDLL) -> None:
    case = make(library, scheme("int8 asym", PER_CHANNEL), 19, 136)
    bias = torch.randn(19)
    for mode in (EXACT, INT8):
        assert torch.equal(linear([case], torch.zeros(3, 136), [bias], mode)[0], bias.expand(3, 19))


def test_python_threads_do_not_disturb_each_other(library: ctypes.CDLL) -> None:
    cases = [make(library, scheme("int4", 32), 512, 256, seed=i) for i in range(4)]
    inputs = [activations(1 + 5 * i, 256, seed=i) for i in range(4)]
    expected = [linear([case], x)[0] for case, x in zip(cases, inputs, strict=True)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(40):
            if not torch.equal(linear([cases[i]], inputs[i], threads=2)[0], expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_the_child_of_a_fork_computes_the_same(library: ctypes.CDLL) -> None:
    case = make(library, scheme("int4", 32), 2048, 256)
    x = activations(2, 256)
    expected = linear([case], x, threads=2)[0]  # the parent has a pool of threads now
    child = os.fork()
    if child == 0:
        same = torch.equal(linear([case], x, threads=2)[0], expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    out=st.integers(1, 50), columns=st.integers(1, 70), bits=st.sampled_from([4, 8]), threads=st.sampled_from([1, 2])
)
def test_unpack_is_the_inverse_of_pack(library: ctypes.CDLL, out: int, columns: int, bits: int, threads: int) -> None:
    codes = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8)
    packed = pack_codes(codes, bits).contiguous()
    tiled = torch.full((library.hfq_codes_bytes(out, columns, bits),), 255, dtype=torch.uint8)
    restored = torch.full_like(packed, 255)
    shape = (ctypes.c_int64(out), ctypes.c_int64(columns), bits, threads)
    assert library.hfq_pack(pointer(packed), pointer(tiled), *shape) == 0
    assert library.hfq_unpack(pointer(tiled), pointer(restored), *shape) == 0
    assert torch.equal(restored, packed)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("columns", "group"), [(96, 32), (36, PER_CHANNEL)])
def test_rows_are_decoded_bit_for_bit(library: ctypes.CDLL, name: str, columns: int, group: int) -> None:
    for scale_type in DTYPES:
        case = make(library, scheme(name, group), 37, columns, scale_type)
        weight = decode(case.codes, case.scale, case.zero, case.scheme)
        for dtype, number in DTYPES.items():
            some = torch.empty((20, columns), dtype=dtype)
            pick = torch.tensor([36, 0, 5, 5, 17])
            picked = torch.empty((5, columns + 2), dtype=dtype)
            ref, first, rows = ctypes.byref(case.weight), ctypes.c_int64(11), ctypes.c_int64(20)
            stride, wide = ctypes.c_int64(columns), ctypes.c_int64(columns + 2)
            assert library.hfq_dequantize(ref, first, rows, pointer(some), stride, number, 2) == 0
            assert library.hfq_gather_rows(ref, pointer(pick), ctypes.c_int64(5), pointer(picked), wide, number, 2) == 0
            assert torch.equal(some, weight[11:31].to(dtype))
            assert torch.equal(picked[:, :columns], weight[pick].to(dtype))


def test_float16_conversion_is_that_of_torch(library: ctypes.CDLL) -> None:
    edges = [
        0.0,
        -0.0,
        1e-8,
        2.9e-8,
        3e-8,
        5.97e-8,
        6.1e-5,
        6.0975e-5,
        65504.0,
        65519.9,
        65520.0,
        1e9,
        2048.5,
        -1.00049,
    ]
    scale = torch.tensor(edges).repeat(2)[:, None]
    codes = torch.full((len(scale), 8), 9, dtype=torch.uint8)
    case = from_tensors(library, scheme("int4", 8), codes, scale, None)
    for dtype in (torch.float16, torch.bfloat16):
        out = torch.empty(codes.shape, dtype=dtype)
        rows, stride = ctypes.c_int64(len(scale)), ctypes.c_int64(8)
        arguments = (ctypes.c_int64(0), rows, pointer(out), stride, DTYPES[dtype], 1)
        assert library.hfq_dequantize(ctypes.byref(case.weight), *arguments) == 0
        assert torch.equal(out.view(torch.int16), scale.expand(-1, 8).to(dtype).view(torch.int16))
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()][:, None]
    case = from_tensors(library, scheme("int4", 8), torch.full((len(halves), 8), 9, dtype=torch.uint8), halves, None)
    out = torch.empty((len(halves), 8))
    arguments = (ctypes.c_int64(0), ctypes.c_int64(len(halves)), pointer(out), ctypes.c_int64(8), 0, 1)
    assert library.hfq_dequantize(ctypes.byref(case.weight), *arguments) == 0
    assert torch.equal(out[:, 0], halves[:, 0].float())


def test_what_cannot_be_computed_is_refused(library: ctypes.CDLL) -> None:
    case = make(library, scheme("int4", 32), 16, 64)
    x = activations(1, 64)
    for field, value in (("bits", 5), ("scale_type", 9), ("group", 12), ("in_features", 65), ("out", 0)):
        keep = getattr(case.weight, field)
        setattr(case.weight, field, value)
        with pytest.raises(AssertionError, match="layout"):
            linear([case], x)
        setattr(case.weight, field, keep)
    for arguments, words in (((None, 7, 1), "mode"), ((None, EXACT, 0), "thread")):
        with pytest.raises(AssertionError, match=words):
            linear([case], x, *arguments)
    outside = torch.tensor([16])
    row = torch.empty((1, 64))
    arguments = (ctypes.c_int64(1), pointer(row), ctypes.c_int64(64), 0, 1)
    assert library.hfq_gather_rows(ctypes.byref(case.weight), pointer(outside), *arguments) != 0


def test_an_unknown_variant_is_an_error(library: ctypes.CDLL) -> None:
    before = library.hfq_variant()
    code = library.hfq_set_variant(b"avx1024")
    assert code != 0 and b"HF_QUANT_NATIVE" in library.hfq_error(code)
    assert library.hfq_variant() == before


def test_no_rows_are_no_work(library: ctypes.CDLL) -> None:
    case = make(library, scheme("int4", 32), 16, 64)
    assert linear([case], torch.empty((0, 64)))[0].shape == (0, 16)
