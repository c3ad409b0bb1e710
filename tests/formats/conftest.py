"""Quantized tensors to put on disk: random codes for exactness, absmax codes where a model must still compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hf_quant.grids import Scheme, decode
from hf_quant.plan import Plan, PlannedLayer
from hf_quant.quantize.double_quant import nest
from hf_quant.tensor import QuantizedTensor, pack_codes


def _random(
    scheme: Scheme, rows: int, columns: int, scale_dtype: torch.dtype = torch.float32, seed: int = 0
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    codes = torch.randint(0, 1 << scheme.bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.randn(rows, groups, generator=generator) * 0.05  # of both signs: the symmetric grid allows it
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(0, 1 << scheme.bits, (rows, groups), generator=generator, dtype=torch.uint8)
    stored = nest(scale) if scheme.double_quant else scale.to(scale_dtype)
    return QuantizedTensor.from_codes(codes, stored, zero, scheme)


def _absmax(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    rows, columns = weight.shape
    grouped = weight.detach().float().view(rows, scheme.groups(columns), -1)
    if scheme.grid != "int":
        plain = grouped.abs().amax(-1)
        nested = nest(plain) if scheme.double_quant else None
        scale = plain if nested is None else nested.scale()
        every = torch.arange(16, dtype=torch.uint8).view(1, 16)
        table = decode(every, torch.ones(1, 1), None, Scheme(scheme.grid, 4, True, 16)).view(16)
        codes = (grouped.div(scale.unsqueeze(-1)).unsqueeze(-1) - table).abs().argmin(-1).to(torch.uint8)
        return QuantizedTensor.from_codes(codes.view(rows, columns), nested or scale, None, scheme)
    top = (1 << scheme.bits) - 1
    if scheme.symmetric:
        scale = (grouped.abs().amax(-1) / (scheme.implied_zero_point - 1)).to(scale_dtype)
        zero = torch.full_like(scale, scheme.implied_zero_point, dtype=torch.uint8)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((high - low) / top).to(scale_dtype)
        zero = (-low / scale.float()).round().clamp(0, top).to(torch.uint8)
    codes = (grouped / scale.float().unsqueeze(-1)).round() + zero.float().unsqueeze(-1)
    codes = codes.clamp(0, top).to(torch.uint8).view(rows, columns)
    return QuantizedTensor(
        pack_codes(codes, scheme.bits), scale, None if scheme.symmetric else zero, scheme, (rows, columns)
    )


def _same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    """Bit for bit: every tensor's bytes, dtype and shape, the scheme and the shape."""
    pairs = list(zip(one.tensors(), other.tensors(), strict=True))
    return (one.scheme, one.shape) == (other.scheme, other.shape) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
        for a, b in pairs
    )


def _plan(layers: dict[str, tuple[str, tuple[int, ...], Scheme | None]], scale_dtype: str = "bfloat16") -> Plan:
    """A plan from ``name -> (kind, shape, scheme)``."""
    planned = tuple(
        PlannedLayer(name, kind, shape, scheme, "absmax" if scheme else "", "default", "", 0, 0)
        for name, (kind, shape, scheme) in layers.items()
    )
    return Plan("AnyForCausalLM", "any", "", scale_dtype, planned)


@pytest.fixture(scope="session")
def random_tensor() -> Callable[..., QuantizedTensor]:
    """``random_tensor(scheme, rows, columns, scale_dtype=float32, seed=0)``: any codes, scales of both signs."""
    return _random


@pytest.fixture(scope="session")
def absmax_tensor() -> Callable[..., QuantizedTensor]:
    """``absmax_tensor(weight [out, in], scheme, scale_dtype=float32)``: plain round to nearest."""
    return _absmax


@pytest.fixture(scope="session")
def same() -> Callable[[QuantizedTensor, QuantizedTensor], bool]:
    """Whether two quantized tensors are equal bit for bit."""
    return _same


@pytest.fixture(scope="session")
def plan_of() -> Callable[..., Plan]:
    """``plan_of({name: (kind, shape, scheme or None)})``."""
    return _plan
