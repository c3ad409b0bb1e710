"""Updates that go into quantized weights: on the grid, right on average, nothing where there is nothing."""

from __future__ import annotations

import pytest
import torch

from hf_quant.errors import WeightError
from hf_quant.grids import Scheme
from hf_quant.quantize.merge import MergeReport, merge_delta
from hf_quant.quantize.weight import quantize_weight

SCHEMES = {
    "int4": Scheme(group_size=32),
    "int4-asym": Scheme(symmetric=False, group_size=32),
    "int8": Scheme(bits=8, group_size=64),
    "int8-channel": Scheme(bits=8, group_size=-1),
    "nf4": Scheme(grid="nf4", group_size=64),
    "nf4-nested": Scheme(grid="nf4", group_size=64, double_quant=True),
    "fp4": Scheme(grid="fp4", group_size=64),
}


def _base(name: str, rows: int = 256):
    weight = torch.randn(rows, 192, generator=torch.Generator().manual_seed(0))
    return quantize_weight(weight, SCHEMES[name], "search")


def _delta(size: float, rows: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 4, generator=generator) @ torch.randn(4, 192, generator=generator) * (size / 2)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("size", [0.001, 0.01, 0.1, 1.0])
def test_the_update_survives_at_every_size(name, size) -> None:
    base, delta = _base(name), _delta(size)
    before = base.dequantize()
    merged, cost = merge_delta(base, delta, name="layer")
    after = merged.dequantize()
    assert (merged.scheme, merged.shape) == (base.scheme, base.shape)
    assert [t.dtype for t in merged.tensors()] == [t.dtype for t in base.tensors()]
    kept = ((after - before) * delta).sum() / delta.square().sum()
    assert cost.kept == pytest.approx(kept.item(), rel=1e-4)
    assert cost.kept == pytest.approx(1, abs=0.25 if size == 0.001 else 0.08)
    error = (after - before - delta).norm() / (before + delta).norm()
    assert cost.error == pytest.approx(error.item(), rel=1e-4)
    # the noise of a small update is smaller than quantizing was, that of a large one is quantizing again
    assert cost.error < (0.02 if base.scheme.bits == 8 else 0.16)


@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_it_is_right_on_average(name) -> None:
    base, delta = _base(name, 16), _delta(0.02, 16)
    mean = torch.stack([merge_delta(base, delta, seed=s)[0].dequantize() for s in range(400)]).mean(0)
    inside = base.codes().ne(0) & base.codes().ne(15)  # the outermost levels have only one neighbour
    if name == "nf4":
        inside &= base.dequantize().abs() < base.scales().abs().repeat_interleave(64, 1) * 0.99
    difference = (mean - base.dequantize() - delta)[inside]
    assert difference.square().mean().sqrt() < 0.5 * delta.square().mean().sqrt()
    assert abs(difference.mean()) < 1e-3


@pytest.mark.parametrize("name", SCHEMES)
def test_no_update_changes_no_bit(name) -> None:
    base = _base(name)
    delta = torch.zeros(base.shape)
    merged, cost = merge_delta(base, delta)
    assert all(torch.equal(a, b) for a, b in zip(merged.tensors(), base.tensors(), strict=True))
    assert (cost.error, cost.kept) == (0, 1)
    delta[0, :64] = 0.01  # one row changes, and no other one
    merged, _ = merge_delta(base, delta)
    assert not torch.equal(merged.packed[0], base.packed[0])
    assert torch.equal(merged.packed[1:], base.packed[1:])


def test_it_is_deterministic_and_layers_differ() -> None:
    base, delta = _base("int4"), _delta(0.02)
    one, again = (merge_delta(base, delta, name="one")[0] for _ in range(2))
    assert torch.equal(one.packed, again.packed)
    assert not torch.equal(one.packed, merge_delta(base, delta, name="two")[0].packed)
    assert not torch.equal(one.packed, merge_delta(base, delta, name="one", seed=1)[0].packed)


def test_groups_of_zeros_take_the_update() -> None:
    base = quantize_weight(torch.zeros(4, 64), SCHEMES["int4"], "absmax")
    merged, cost = merge_delta(base, _delta(0.02, 4)[:, :64])
    assert cost.error < 0.16 and cost.kept == pytest.approx(1, abs=0.05)
    assert merged.dequantize().abs().max() > 0


def test_bad_updates_are_named() -> None:
    base = _base("int4", 8)
    with pytest.raises(WeightError, match=r"q_proj: the update is \[8, 3\]"):
        merge_delta(base, torch.zeros(8, 3), name="q_proj")
    with pytest.raises(WeightError, match=r"q_proj: .* Inf"):
        merge_delta(base, torch.full((8, 192), float("inf")), name="q_proj")


def test_report() -> None:
    costs = [merge_delta(_base(n), _delta(0.02), name=n)[1] for n in ("int8", "int4")]
    report = MergeReport.of(costs)
    assert report.worst is costs[1] and report.max_error == costs[1].error
    assert report.mean_error == pytest.approx((costs[0].error + costs[1].error) / 2)
    text = str(report)
    assert text.startswith("2 layers re-quantized to int4 sym g32, int8 sym g64: ")
    assert f"{report.max_error:.2%} at most (int4)" in text and f"hold {report.mean_kept:.0%}" in text
    assert str(MergeReport.of([])) == "no quantized layer was merged"
    assert MergeReport.of([]).mean_error == MergeReport.of([]).max_error == 0
