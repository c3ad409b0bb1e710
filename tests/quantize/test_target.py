"""The weight to aim at: exact where the float outputs can be had again, plain where a correction would be noise."""

from __future__ import annotations

import pytest
import torch

from hf_quant.calibration.statistics import Moments, token_rows
from hf_quant.quantize.target import correct

WIDTH, ROWS = 48, 20


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _moments(seen: torch.Tensor, exact: torch.Tensor | None = None, gap: torch.Tensor | None = None) -> Moments:
    moments = Moments.zeros(seen.shape[1], seen.device)
    half = len(seen) // 2
    for piece in (slice(0, half), slice(half, None)):  # streamed
        moments.add(seen[piece], None if exact is None else exact[piece], None if gap is None else gap[piece])
    return moments


WEIGHT = _random(ROWS, WIDTH, seed=0) * 0.1


def test_an_invertible_map_is_undone() -> None:
    mixing = torch.eye(WIDTH) + 0.05 * _random(WIDTH, WIDTH, seed=1)
    exact = _random(3000, WIDTH, seed=2)
    seen = exact @ mixing
    target = correct(WEIGHT, _moments(seen[:2400], exact[:2400]), _moments(seen[2400:], exact[2400:]))
    assert target.damping == 0.003  # nothing but the map is to be learnt: the least damping is best
    undone = WEIGHT @ torch.linalg.inv(mixing).t()
    assert (target.weight - undone).norm() < 0.02 * (WEIGHT - undone).norm()
    left = (seen @ target.weight.t() - exact @ WEIGHT.t()).square().sum()
    before = (seen @ WEIGHT.t() - exact @ WEIGHT.t()).square().sum()
    assert left < 1e-3 * before
    # the gain is a share of the output on the held-out tokens
    output = (seen[2400:] @ WEIGHT.t()).square().sum()
    drift = (seen[2400:] @ WEIGHT.t() - exact[2400:] @ WEIGHT.t()).square().sum()
    assert target.gain == pytest.approx(float(drift / output), rel=0.01)


def test_noise_that_does_not_generalise_leaves_the_weight_alone() -> None:
    seen = _random(3000, WIDTH, seed=3)
    noise = 0.3 * _random(3000, WIDTH, seed=4)
    # few tokens, and drift that has nothing to do with the inputs: what is learnt on them is wrong on others
    few = slice(0, 60)
    target = correct(WEIGHT, _moments(seen[few], seen[few] + noise[few]), _moments(seen[60:], seen[60:] + noise[60:]))
    assert target.damping is None
    assert target.gain == 0.0
    assert target.weight is WEIGHT


def test_of_half_true_drift_as_much_is_taken_as_holds() -> None:
    mixing = torch.eye(WIDTH) + 0.05 * _random(WIDTH, WIDTH, seed=1)
    exact = _random(4000, WIDTH, seed=2)
    seen = exact @ mixing + 0.2 * _random(4000, WIDTH, seed=5)
    train, held, fresh = slice(0, 300), slice(300, 1000), slice(1000, None)
    target = correct(WEIGHT, _moments(seen[train], exact[train]), _moments(seen[held], exact[held]))
    assert target.damping is not None

    def error(weight: torch.Tensor) -> float:
        return float((seen[fresh] @ weight.t() - exact[fresh] @ WEIGHT.t()).square().sum())

    assert error(target.weight) < 0.9 * error(WEIGHT)  # on tokens that nobody saw


def test_what_is_missing_in_the_residual_stream_is_made_up_for() -> None:
    seen = _random(3000, WIDTH, seed=6)
    lost = _random(ROWS, WIDTH, seed=7) * 0.02  # float minus quantized stream, a linear function of the inputs
    gap = seen @ lost.t()
    moments = [_moments(seen[part], seen[part], gap[part]) for part in (slice(0, 2400), slice(2400, None))]
    target = correct(WEIGHT, *moments)
    assert (target.weight - (WEIGHT + lost)).norm() < 0.02 * lost.norm()
    assert target.gain > 0


@pytest.mark.parametrize("empty", ["seen", "held_out", "both"])
def test_without_tokens_to_judge_by_the_weight_stays(empty: str) -> None:
    seen = _random(500, WIDTH, seed=8)
    some, none = _moments(seen, 1.1 * seen), Moments.zeros(WIDTH, seen.device)
    train, held = (none if empty in ("seen", "both") else some), (none if empty in ("held_out", "both") else some)
    assert correct(WEIGHT, train, held).weight is WEIGHT


def test_no_drift_and_dead_inputs() -> None:
    seen = _random(500, WIDTH, seed=9)
    assert correct(WEIGHT, _moments(seen, seen), _moments(seen, seen)).weight is WEIGHT
    nothing = _moments(seen * 0, seen * 0)
    assert nothing.tokens == 500
    assert correct(WEIGHT, nothing, nothing).weight is WEIGHT
    seen[:, 10:] = 0
    target = correct(WEIGHT, _moments(seen, 1.1 * seen), _moments(seen, 1.1 * seen))
    assert torch.isfinite(target.weight).all()
    assert torch.equal(target.weight[:, 10:], WEIGHT[:, 10:])
    torch.testing.assert_close(target.weight[:, :10], 1.1 * WEIGHT[:, :10], rtol=0.01, atol=1e-4)


# --- the statistics themselves ---


def test_moments_are_the_sums_that_they_say() -> None:
    seen, exact = _random(70, WIDTH, seed=1), _random(70, WIDTH, seed=2)
    gap = _random(70, ROWS, seed=3)
    moments = _moments(seen, exact, gap)
    assert moments.tokens == 70
    torch.testing.assert_close(moments.hessian, seen.t() @ seen, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.drift, seen.t() @ (exact - seen), rtol=1e-4, atol=1e-4)
    assert moments.residual is not None
    torch.testing.assert_close(moments.residual, seen.t() @ gap, rtol=1e-4, atol=1e-4)
    both = _moments(seen).plus(moments)
    assert both.tokens == 140 and both.residual is moments.residual
    torch.testing.assert_close(both.hessian, 2 * moments.hessian)
    torch.testing.assert_close(both.drift, moments.drift)
    assert moments.plus(_moments(seen)).residual is moments.residual
    empty = Moments.zeros(WIDTH, seen.device)
    empty.add(seen[:0], exact[:0], None)
    assert empty.tokens == 0


def test_token_rows_drop_padding() -> None:
    values = torch.arange(24.0).view(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    kept = values.view(6, 4)[[0, 1, 4, 5]]
    assert torch.equal(token_rows(values, mask), kept)
    assert torch.equal(token_rows(values.view(6, 4), mask), kept)
    assert torch.equal(token_rows(values, mask.bool()), kept)
    assert torch.equal(token_rows(values, None), values.view(6, 4))
    assert token_rows(values.to(torch.bfloat16), mask).dtype == torch.float32
