"""ctypes access to the native library for its tests, and float64 references of what it computes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hf_quant.grids import Scheme, decode, levels
from hf_quant.kernels import build
from hf_quant.tensor import pack_codes

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EXACT, INT8 = 0, 1


class Weight(ctypes.Structure):
    """``hfq_weight`` of csrc/hf_quant.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("table_grid", "bits", "scale_type", "reserved")),
        *((name, ctypes.c_int64) for name in ("out", "in_features", "group")),
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "table")),
    ]


def load() -> ctypes.CDLL:
    """The library, built first when it is older than its sources; skips the test where there is no compiler."""
    stale = max(path.stat().st_mtime for path in build.SOURCES.iterdir())
    library = Path(build.LIBRARY)
    if not library.exists() or library.stat().st_mtime < stale:
        if build.compiler() is None:
            pytest.skip("no C++ compiler")
        reason = build.build()
        assert reason is None, reason
    loaded = ctypes.CDLL(str(library))
    loaded.hfq_variant.restype = ctypes.c_char_p
    loaded.hfq_error.restype = ctypes.c_char_p
    loaded.hfq_codes_bytes.restype = ctypes.c_int64
    loaded.hfq_codes_bytes.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int32]
    return loaded


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@dataclass
class Case:
    """A random weight: canonical tensors, and the tiled ones that keep the memory of ``weight`` alive."""

    library: ctypes.CDLL
    scheme: Scheme
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    weight: Weight
    keep: tuple[torch.Tensor | None, ...]

    def value(self) -> torch.Tensor:
        """The weight in float64, before any rounding."""
        out, columns = self.codes.shape
        grouped = self.codes.view(out, -1, self.scheme.group(columns)).double()
        if self.scheme.grid == "int":
            zero = self.scheme.implied_zero_point if self.zero is None else self.zero.double().unsqueeze(-1)
            grouped = grouped - zero
        else:
            grouped = levels(self.scheme.grid).double()[grouped.long()]
        return (grouped * self.scale.double().unsqueeze(-1)).view(out, columns)

    def rounded(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as the reference path rounds it, then in float64."""
        return decode(self.codes, self.scale, self.zero, self.scheme).to(dtype).double()

    def magnitude(self) -> torch.Tensor:
        """What the kernels may add up before they subtract zero points: the scale of their rounding errors."""
        out, columns = self.codes.shape
        if self.scheme.grid != "int":
            return self.value().abs()
        top = self.codes.view(out, -1, self.scheme.group(columns)).double() + 2**self.scheme.bits
        return (top * self.scale.double().abs().unsqueeze(-1)).view(out, columns)


def tiles(values: torch.Tensor) -> torch.Tensor:
    """``[out, groups]`` -> ``[tiles, groups, 16]``, padded with zeros."""
    out, groups = values.shape
    padded = torch.zeros((-(-out // 16) * 16, groups), dtype=values.dtype)
    padded[:out] = values
    return padded.view(-1, 16, groups).transpose(1, 2).contiguous()


def make(
    library: ctypes.CDLL, scheme: Scheme, out: int, columns: int, scale_type: torch.dtype = torch.float32, seed: int = 0
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    codes = torch.randint(0, 2**scheme.bits, (out, columns), dtype=torch.uint8, generator=generator)
    scale = ((torch.rand((out, groups), generator=generator) + 0.5) * 0.02).to(scale_type)
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(0, 2**scheme.bits, (out, groups), dtype=torch.uint8, generator=generator)
    return from_tensors(library, scheme, codes, scale, zero)


def from_tensors(
    library: ctypes.CDLL, scheme: Scheme, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> Case:
    out, columns = codes.shape
    packed = pack_codes(codes, scheme.bits).contiguous()
    tiled = torch.empty(library.hfq_codes_bytes(out, columns, scheme.bits), dtype=torch.uint8)
    arguments = (ctypes.c_int64(out), ctypes.c_int64(columns), scheme.bits, 1)
    assert library.hfq_pack(pointer(packed), pointer(tiled), *arguments) == 0
    tiled_scale, tiled_zero = tiles(scale), None if zero is None else tiles(zero)
    table = None if scheme.grid == "int" else levels(scheme.grid)
    weight = Weight(
        table_grid=int(table is not None),
        bits=scheme.bits,
        scale_type=DTYPES[scale.dtype],
        out=out,
        in_features=columns,
        group=scheme.group(columns),
        codes=pointer(tiled),
        scale=pointer(tiled_scale),
        zero=pointer(tiled_zero),
        table=pointer(table),
    )
    return Case(library, scheme, codes, scale, zero, weight, (tiled, tiled_scale, tiled_zero, table))


def linear(
    cases: list[Case],
    x: torch.Tensor,
    biases: list[torch.Tensor | None] | None = None,
    mode: int = EXACT,
    threads: int = 1,
) -> list[torch.Tensor]:
    """``hfq_linear``: x ``[rows, in]`` of any row stride; raises AssertionError with the library's words."""
    count, rows = len(cases), x.shape[0]
    # padded rows filled with a value that no product has, so that writing past the end is seen
    outs = [torch.full((rows, case.weight.out + 3), 77.0, dtype=x.dtype) for case in cases]
    weights = (ctypes.c_void_p * count)(*(ctypes.addressof(case.weight) for case in cases))
    y = (ctypes.c_void_p * count)(*(out.data_ptr() for out in outs))
    strides = (ctypes.c_int64 * count)(*(out.stride(0) for out in outs))
    bias = None
    if biases is not None:
        bias = (ctypes.c_void_p * count)(*(None if b is None else b.data_ptr() for b in biases))
    library = cases[0].library
    code = library.hfq_linear(
        weights, count, pointer(x), ctypes.c_int64(rows), ctypes.c_int64(x.stride(0)), DTYPES[x.dtype],
        y, strides, bias, mode, threads,
    )  # fmt: skip
    assert code == 0, library.hfq_error(code)
    for out in outs:
        assert (out[:, -3:] == 77.0).all()
    return [out[:, :-3] for out in outs]


def int8_activations(x: torch.Tensor, group: int) -> torch.Tensor:
    """x ``[rows, in]`` rounded to int8 per row and block of at most 128 columns of a group, in float64."""
    result = torch.empty(x.shape, dtype=torch.float64)
    for start in range(0, x.shape[1], group):
        for first in range(start, start + group, 128):
            block = x[:, first : min(first + 128, start + group)].float()
            largest = block.abs().amax(dim=1, keepdim=True)
            # a number divided by a tensor would be its reciprocal times the number, which rounds twice
            inverse = torch.where(largest > 1e-36, torch.full_like(largest, 127.0) / largest, 0.0)
            codes = (block * inverse).round()
            result[:, first : first + block.shape[1]] = codes.double() * (largest / 127.0).double()
    return result


def assert_product(y: torch.Tensor, x: torch.Tensor, case: Case, bias: torch.Tensor | None = None) -> None:
    """Every element within rounding of the float64 product, with the weight as it is or rounded as the reference does.

    Errors allowed: half a step of y's dtype, and float32 sums of terms as large as ``case.magnitude()``.
    """
    step = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[y.dtype]
    x = x.double()
    sums = x.abs() @ case.magnitude().T
    worst = []
    for weight in (case.value(), case.rounded(y.dtype)):
        expected = x @ weight.T
        if bias is not None:
            expected = expected + bias.double()
        tiny = 1e-6 if y.dtype == torch.float16 else 1e-30
        allowed = step * expected.abs() * 1.001 + 1.5e-6 * sums + tiny
        if case.scheme.grid == "nf4" and y.dtype == torch.bfloat16:
            allowed = allowed + 0.95 * 2.0**-9 * sums  # the levels times a common factor, rounded to bfloat16
        worst.append(((y.double() - expected).abs() / allowed).max().item())
    assert min(worst) <= 1.0, f"errors of {worst} times what is allowed"
