"""Rounding under a Hessian: better than nearest codes, honest about its loss, and unmoved by hostile statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quant.errors import CalibrationError
from hf_quant.grids import PER_CHANNEL, Scheme
from hf_quant.quantize.gptq import DAMPING, factorize, round_weight
from hf_quant.quantize.rounding import nearest_codes
from hf_quant.quantize.weight import quantize_weight

COLUMNS = 128
SCHEMES = [
    Scheme("int", 4, True, 32),
    Scheme("int", 4, True, 64),
    Scheme("int", 4, True, PER_CHANNEL),
    Scheme("int", 4, False, 32),
    Scheme("int", 4, False, PER_CHANNEL),
    Scheme("int", 8, True, 64),
    Scheme("int", 8, False, PER_CHANNEL),
    Scheme("nf4", 4, True, 64),
    Scheme("nf4", 4, True, 64, double_quant=True),
    Scheme("nf4", 4, True, PER_CHANNEL),
    Scheme("fp4", 4, True, 32),
    Scheme("fp4", 4, True, 32, double_quant=True),
]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)


def inputs(tokens: int = 1024, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    """Activations as models have them: correlated, and a few channels much larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    mixing = mixing + 0.7 * torch.randn(columns, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
    size = torch.exp(torch.randn(columns, generator=generator))
    return (torch.randn(tokens, columns, generator=generator) @ mixing) * size


def weights(rows: int = 48, columns: int = COLUMNS, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def loss(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E H E^T), in float64."""
    wide = difference.double()
    return float(((wide @ hessian.double()) * wide).sum())


def damped(hessian: torch.Tensor, share: float) -> torch.Tensor:
    result = hessian.clone()
    result.diagonal().add_(share * (float(hessian.diagonal().mean()) or 1.0))
    return result


def rounded(weight: torch.Tensor, scheme: Scheme, hessian: torch.Tensor, **options):
    return round_weight(weight, scheme, factorize(hessian, scheme.group(weight.shape[1]), "fc"), **options)


@schemes
def test_beats_nearest_rounding(scheme: Scheme) -> None:
    x, weight = inputs(), weights()
    hessian = x.t() @ x
    found = rounded(weight, scheme, hessian).tensor
    error = loss(found.dequantize() - weight, hessian)
    assert error < 0.8 * loss(quantize_weight(weight, scheme).dequantize() - weight, hessian)
    # nearest codes for the very scales that were found: what carrying the error over is worth
    group = scheme.group(COLUMNS)
    zero = None if found.zero_point is None else found.zero_point.reshape(-1).float()
    codes = nearest_codes(weight.view(-1, group), found.scales().float().reshape(-1), zero, scheme)
    nearest = type(found).from_codes(codes.view(weight.shape), found.nested or found.scale, found.zero_point, scheme)
    assert error < 0.8 * loss(nearest.dequantize() - weight, hessian)


@schemes
def test_the_loss_is_that_of_what_is_stored(scheme: Scheme) -> None:
    """Codes and scales come back in the weight's own order, or this would be the loss of another matrix."""
    x, weight = inputs(), weights()
    hessian = x.t() @ x
    found = rounded(weight, scheme, hessian)
    expected = loss(found.tensor.dequantize() - weight, damped(hessian, DAMPING))
    assert found.loss == pytest.approx(expected, rel=2e-3)


def test_the_most_active_columns_come_first_and_groups_stay_together() -> None:
    activity = torch.arange(1.0, 65.0)
    activity[32:] -= 31.5  # the second group is less active: 1.5 .. 32.5
    factor = factorize(torch.diag(activity), 32, "fc")
    assert factor.groups == (1, 0)
    assert factor.order.tolist() == [*range(63, 31, -1), *range(31, -1, -1)]
    assert factor.damping == DAMPING


def test_the_factor_is_that_of_the_inverse() -> None:
    x = inputs()
    hessian = x.t() @ x
    factor = factorize(hessian, 32, "fc")
    inverse = torch.linalg.inv(damped(hessian, DAMPING).double())[factor.order][:, factor.order]
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.t() @ upper, inverse, rtol=1e-2, atol=1e-3 * float(inverse.abs().max()))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_are_stored_as_asked(scale_dtype: torch.dtype) -> None:
    x = inputs()
    found = rounded(weights(), Scheme("int", 4, False, 32), x.t() @ x, scale_dtype=scale_dtype)
    assert found.tensor.scale is not None and found.tensor.scale.dtype == scale_dtype
    assert found.loss == pytest.approx(
        loss(found.tensor.dequantize() - weights(), damped(x.t() @ x, DAMPING)), rel=2e-3
    )


def test_an_identity_hessian_gives_nearest_codes() -> None:
    weight = weights(columns=64)
    found = rounded(weight, Scheme("int", 8, True, 64), torch.eye(64)).tensor
    assert found.scale is not None
    codes = nearest_codes(weight, found.scale.float().view(-1), None, found.scheme)
    assert torch.equal(found.codes(), codes)


def test_a_weight_that_the_grid_holds_comes_back_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (16, 64), generator=generator).float()
    codes[:, 0] = codes[:, 32] = -8.0
    weight = codes * 0.125
    x = inputs(columns=64)
    found = rounded(weight, Scheme("int", 4, True, 32), x.t() @ x)
    assert torch.equal(found.tensor.dequantize(), weight)
    assert found.loss == 0.0


# --- statistics that are hard to work with ---


@pytest.mark.parametrize("dead", [1, 40, 96])
@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[3], SCHEMES[8]], ids=lambda s: s.label)
def test_dead_inputs(dead: int, scheme: Scheme) -> None:
    x, weight = inputs(), weights()
    x[:, :dead] = 0
    hessian = x.t() @ x
    found = rounded(weight, scheme, hessian)
    value = found.tensor.dequantize()
    assert torch.isfinite(value).all()
    assert loss(value - weight, hessian) < loss(quantize_weight(weight, scheme).dequantize() - weight, hessian)
    # no data says anything about them, and they are not sacrificed for it
    nearest = quantize_weight(weight, scheme).dequantize()
    assert (value - weight)[:, :dead].square().sum() < 3 * (nearest - weight)[:, :dead].square().sum()


@pytest.mark.parametrize("tokens", [1, 2, 16, 100])
def test_too_few_tokens_for_a_full_rank(tokens: int) -> None:
    x, weight = inputs(tokens), weights()
    found = rounded(weight, SCHEMES[0], x.t() @ x)
    nearest = quantize_weight(weight, SCHEMES[0]).dequantize()
    value = found.tensor.dequantize()
    assert loss(value - weight, x.t() @ x) < 0.5 * loss(nearest - weight, x.t() @ x)
    # the freedom that few tokens leave is not used to run away from the weight
    assert (value - weight).square().sum() < 3 * (nearest - weight).square().sum()


def test_a_hessian_that_says_nothing() -> None:
    found = rounded(weights(), SCHEMES[0], torch.zeros(COLUMNS, COLUMNS))
    error = (found.tensor.dequantize() - weights()).square().sum()
    assert error < 1.3 * (quantize_weight(weights(), SCHEMES[0]).dequantize() - weights()).square().sum()


@pytest.mark.parametrize("rounding_noise", [1e-4, 1e-2])
def test_a_hessian_that_is_not_quite_positive_is_damped_until_it_factors(rounding_noise: float) -> None:
    x = inputs(8)
    hessian = x.t() @ x
    hessian -= rounding_noise * hessian.diagonal().mean() * torch.eye(COLUMNS)
    factor = factorize(hessian, 32, "fc")
    assert torch.isfinite(factor.upper).all()
    assert factor.damping >= DAMPING
    if rounding_noise >= DAMPING:
        assert factor.damping > DAMPING


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(value: float) -> None:
    x = inputs()
    x[3, 5] = value
    with pytest.raises(CalibrationError, match=r"model\.layers\.0\.fc .*not finite"):
        factorize(x.t() @ x, 32, "model.layers.0.fc")


def test_a_hessian_that_no_damping_mends() -> None:
    with pytest.raises(CalibrationError, match="cannot be factored"):
        factorize(torch.diag(torch.full((32,), 1.0)) - 1e9 * torch.ones(32, 32).fill_diagonal_(0), 32, "fc")


@pytest.mark.parametrize("scale", [1e-18, 1e-8, 1e8, 1e15])
@pytest.mark.parametrize("scheme", [SCHEMES[3], SCHEMES[5], SCHEMES[8]], ids=lambda s: s.label)
def test_the_size_of_the_inputs_does_not_matter(scale: float, scheme: Scheme) -> None:
    x, weight = inputs(), weights(16)
    plain = rounded(weight, scheme, x.t() @ x).tensor.dequantize()
    scaled = rounded(weight, scheme, (x.t() @ x) * scale**2).tensor.dequantize()
    # the same but for ties that float32 breaks differently
    hessian = x.t() @ x
    assert loss(scaled - weight, hessian) == pytest.approx(loss(plain - weight, hessian), rel=0.05)


@pytest.mark.parametrize("size", [1e-15, 1e-8, 1e6, 1e15])
@pytest.mark.parametrize("scheme", [SCHEMES[3], SCHEMES[5], SCHEMES[8]], ids=lambda s: s.label)
def test_the_size_of_the_weights_does_not_matter(size: float, scheme: Scheme) -> None:
    x, weight = inputs(), weights(16)
    value = rounded(weight * size, scheme, x.t() @ x).tensor.dequantize() / size
    assert torch.isfinite(value).all()
    nearest = quantize_weight(weight * size, scheme).dequantize() / size
    assert loss(value - weight, x.t() @ x) < 0.9 * loss(nearest - weight, x.t() @ x)


@schemes
def test_zero_weights(scheme: Scheme) -> None:
    x = inputs()
    weight = weights()
    weight[:, 32:96] = 0
    weight[7] = 0
    value = rounded(weight, scheme, x.t() @ x).tensor.dequantize()
    assert torch.isfinite(value).all()
    assert (value[7] == 0).all()
    assert (rounded(weight * 0, scheme, x.t() @ x).tensor.dequantize() == 0).all()


@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    group=st.sampled_from([16, 32, 64]),
    tokens=st.integers(1, 80),
    kind=st.sampled_from([("int", 4, True), ("int", 4, False), ("int", 8, True), ("int", 8, False), ("nf4", 4, True)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, database=None)
def test_any_shape(rows: int, groups: int, group: int, tokens: int, kind: tuple, seed: int) -> None:
    scheme = Scheme(*kind, group)
    columns = groups * group
    x, weight = inputs(tokens, columns, seed), weights(rows, columns, seed)
    hessian = x.t() @ x
    found = rounded(weight, scheme, hessian)
    assert found.tensor.shape == (rows, columns)
    value = found.tensor.dequantize()
    assert torch.isfinite(value).all()
    share = factorize(hessian, group, "fc").damping
    assert found.loss == pytest.approx(loss(value - weight, damped(hessian, share)), rel=0.02, abs=1e-9)


def test_deterministic_and_the_weight_is_left_alone() -> None:
    x, weight = inputs(), weights()
    hessian = x.t() @ x
    before, kept = weight.clone(), hessian.clone()
    first, second = rounded(weight, SCHEMES[3], hessian), rounded(weight, SCHEMES[3], hessian)
    assert torch.equal(weight, before) and torch.equal(hessian, kept)
    assert all(torch.equal(a, b) for a, b in zip(first.tensor.tensors(), second.tensor.tensors(), strict=True))
