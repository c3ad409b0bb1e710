"""Quantized weights made to order, and how far a product may be from the exact one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hf_quant.grids import DOUBLE_QUANT_BLOCK, Scheme, decode
from hf_quant.kernels.registry import LayerSpec
from hf_quant.tensor import DoubleQuant, QuantizedTensor

MakeTensor = Callable[..., QuantizedTensor]
Distance = Callable[[torch.Tensor, torch.Tensor, QuantizedTensor], float]


def _make(
    scheme: Scheme, out: int, columns: int, *, scale_dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> QuantizedTensor:
    """Uniform codes and zero points; scales of both signs, one in eight of them zero."""
    generator = torch.Generator().manual_seed(seed)
    top, groups = 1 << scheme.bits, scheme.groups(columns)
    codes = torch.randint(0, top, (out, columns), generator=generator, dtype=torch.uint8)
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(0, top, (out, groups), generator=generator, dtype=torch.uint8)
    if scheme.double_quant:
        nested = DoubleQuant(
            torch.randint(0, 256, (out, groups), generator=generator, dtype=torch.uint8),
            torch.rand(-(-out * groups // DOUBLE_QUANT_BLOCK), generator=generator),
            torch.tensor(0.25),
            torch.linspace(-1, 1, 256),
        )
        return QuantizedTensor.from_codes(codes, nested, zero, scheme)
    scale = torch.randn(out, groups, generator=generator) * 0.02
    scale[torch.rand(out, groups, generator=generator) < 1 / 8] = 0.0
    return QuantizedTensor.from_codes(codes, scale.to(scale_dtype), zero, scheme)


def _distance(y: torch.Tensor, x: torch.Tensor, tensor: QuantizedTensor) -> float:
    """Error of ``y`` as ``x @ weight.T`` in float64, in units of the dtype's epsilon and of a typical result.

    Typical is ``|x| |weight| / sqrt(in)`` in Frobenius norms, what a product has whose rows are not aligned. Rounding
    the weight, the result and a partial result or two moves it by less than one epsilon; float32 sums add in/2^24.
    """
    weight = decode(tensor.codes(), tensor.scales(), tensor.zero_point, tensor.scheme).double()
    exact = x.double() @ weight.t()
    typical = float(x.double().norm() * weight.norm()) / tensor.shape[1] ** 0.5
    epsilon = torch.finfo(y.dtype).eps + tensor.shape[1] * torch.finfo(torch.float32).eps
    return float((y.double() - exact).norm()) / (epsilon * typical + torch.finfo(y.dtype).smallest_normal)


def _spec(tensor: QuantizedTensor, dtype: torch.dtype) -> LayerSpec:
    return LayerSpec(tensor.scheme, tensor.shape[0], tensor.shape[1], "cpu", dtype)


def _assert_close(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Two roundings of y's dtype apart at most, judged by the largest element."""
    epsilon = torch.finfo(y.dtype).eps
    size = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(y, expected, rtol=2 * epsilon, atol=2 * epsilon * size)


@pytest.fixture
def assert_close() -> Callable[[torch.Tensor, torch.Tensor], None]:
    return _assert_close


@pytest.fixture
def make_tensor() -> MakeTensor:
    return _make


@pytest.fixture
def distance() -> Distance:
    return _distance


@pytest.fixture
def spec_of() -> Callable[[QuantizedTensor, torch.dtype], LayerSpec]:
    return _spec
