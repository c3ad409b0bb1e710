"""A weight update goes into a quantized weight: codes and scales of ``base + delta`` on the grid of the base.

The base lies on its grid, and the updates of fine-tuning are much smaller than a step of it: rounding to the nearest
code gives the base back, without the update (SmolLM2 in int4, a LoRA of 24 steps: 0.3 % of it survive). So small
updates are rounded at random, up or down in proportion to the distance (stochastic rounding, arXiv:1502.02551): every
weight is right on average, products over many columns keep the update, and the price is noise, which is measured.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from hf_quant.errors import WeightError
from hf_quant.grids import decode, levels
from hf_quant.quantize.rounding import nearest_codes, reciprocal
from hf_quant.quantize.weight import quantize_weight
from hf_quant.tensor import QuantizedTensor, pack_codes

# updates larger than this part of a step (root mean square of a group) move enough codes by themselves: rounding them
# to nearest keeps 98 % of a Gaussian update, with half of the noise
LARGE = 0.5


@dataclass(frozen=True)
class MergeCost:
    """What putting an update into one quantized weight did to it.

    Attributes:
        name: of the layer.
        label: of its scheme (``int4 sym g32``).
        error: ``|merged - (base + delta)| / |base + delta|`` (Frobenius norms).
        kept: how much of the update is in the merged weight: ``<merged - base, delta> / <delta, delta>``; about 1 when
            the error is mere noise, 0 when the update was rounded away.
    """

    name: str
    label: str
    error: float
    kept: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge costs, layer by layer; ``str()`` of it is one sentence."""

    layers: tuple[MergeCost, ...]

    @classmethod
    def of(cls, costs: Iterable[MergeCost]) -> MergeReport:
        return cls(tuple(costs))

    @property
    def mean_error(self) -> float:
        """Mean over the layers of :attr:`MergeCost.error`; 0 without layers."""
        return _mean([cost.error for cost in self.layers])

    @property
    def mean_kept(self) -> float:
        """Mean over the layers of :attr:`MergeCost.kept`; 0 without layers."""
        return _mean([cost.kept for cost in self.layers])

    @property
    def worst(self) -> MergeCost | None:
        """The layer with the largest :attr:`MergeCost.error`."""
        return max(self.layers, key=lambda cost: cost.error, default=None)

    @property
    def max_error(self) -> float:
        """The largest :attr:`MergeCost.error`; 0 without layers."""
        return 0.0 if self.worst is None else self.worst.error

    def __str__(self) -> str:
        if self.worst is None:
            return "no quantized layer was merged"
        labels = ", ".join(sorted({cost.label for cost in self.layers}))
        count = f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''}"
        return (
            f"{count} re-quantized to {labels}: the merged weights differ from base + adapter by "
            f"{self.mean_error:.2%} on average and {self.max_error:.2%} at most ({self.worst.name}), "
            f"and hold {self.mean_kept:.0%} of the adapter's update"
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@torch.no_grad()
def merge_delta(
    base: QuantizedTensor, delta: torch.Tensor, *, name: str = "weight", seed: int = 0
) -> tuple[QuantizedTensor, MergeCost]:
    """Quantize ``base + delta`` on the grid of ``base``, and measure the error.

    Groups whose update is small keep their scale (and zero point), and their codes are rounded at random, see above.
    The others take the better, by squared error, of nearest codes on their own scale and a scale searched for the new
    values. Nested scales are encoded together: they are searched anew when most groups would be, and it is better. An
    update of zero leaves every bit as it was.

    Args:
        base: ``[out, in]``; not changed.
        delta: floating ``[out, in]``, finite.
        name: named in errors and in the cost; together with ``seed`` it decides how weights are rounded.
        seed: the same one gives the same codes on one kind of device.

    Returns:
        The merged weight (same scheme, shape and dtypes as ``base``) and what it cost.

    Raises:
        WeightError: NaN or Inf in ``delta``, or another shape.
    """
    if tuple(delta.shape) != base.shape:
        raise WeightError(f"{name}: the update is {list(delta.shape)}, the weight {list(base.shape)}.", "pass its own.")
    if base.order is not None:  # groups are of stored columns
        stored = replace(base, order=None)
        merged, cost = merge_delta(stored, delta.index_select(1, base.order.to(delta.device)), name=name, seed=seed)
        return replace(merged, order=base.order), cost
    delta = delta.to(device=base.device, dtype=torch.float32)
    if not torch.isfinite(delta).all():
        raise WeightError(f"{name}: the update holds NaN or Inf.", "the adapter is damaged, or its training diverged.")
    if not delta.any():
        return base, MergeCost(name, base.scheme.label, 0.0, 1.0)
    before = base.dequantize()
    target = before + delta
    generator = torch.Generator(base.device).manual_seed(zlib.crc32(name.encode()) ^ seed)
    merged = _better(base, before, target, generator, name)
    after = merged.dequantize()
    whole = float(target.norm())
    error = float((after - target).norm()) / whole if whole else 0.0
    kept = float(((after - before) * delta).sum() / delta.square().sum())
    return merged, MergeCost(name, base.scheme.label, error, kept)


def _better(
    base: QuantizedTensor, before: torch.Tensor, target: torch.Tensor, generator: torch.Generator, name: str
) -> QuantizedTensor:
    scheme, (rows, columns) = base.scheme, base.shape
    group = scheme.group(columns)
    # the mean step of a table grid: 16 levels over twice the scale
    step = base.scales().to(torch.float32).abs() * (1 if scheme.grid == "int" else 2 / 15)
    large = (target - before).view(rows, -1, group).square().mean(2).sqrt() > LARGE * step  # [out, groups]
    kept = _with_scales_of(base, before, target, large, generator)
    if not large.any():
        return kept
    stored = torch.float32 if base.scale is None else base.scale.dtype
    searched = quantize_weight(target, scheme, "search", scale_dtype=stored, name=name)
    errors = [_group_errors(tensor, target) for tensor in (kept, searched)]
    if base.nested is not None:
        return searched if large.float().mean() > 0.5 and errors[1].sum() < errors[0].sum() else kept
    anew = large & (errors[1] < errors[0])
    assert kept.scale is not None and searched.scale is not None
    zero = None
    if kept.zero_point is not None and searched.zero_point is not None:
        zero = torch.where(anew, searched.zero_point, kept.zero_point)
    codes = torch.where(anew.repeat_interleave(group, dim=1), searched.codes(), kept.codes())
    return QuantizedTensor.from_codes(codes, torch.where(anew, searched.scale, kept.scale), zero, scheme)


def _with_scales_of(
    base: QuantizedTensor,
    before: torch.Tensor,
    target: torch.Tensor,
    large: torch.Tensor,
    generator: torch.Generator,
) -> QuantizedTensor:
    """``target`` on the scales and zero points of ``base``: nearest codes in the ``large`` groups, else drawn ones."""
    scheme, (rows, columns) = base.scheme, base.shape
    groups = target.reshape(-1, scheme.group(columns))
    scale = base.scales().reshape(-1).to(torch.float32)
    zero = None if base.zero_point is None else base.zero_point.reshape(-1).to(torch.float32)
    drawn = _random_codes(groups, scale, zero, base, generator)
    codes = torch.where(large.view(-1, 1), nearest_codes(groups, scale, zero, scheme), drawn).view(rows, columns)
    # levels of the same value (fp4 has two zeros) keep their code
    same = decode(codes, base.scales(), base.zero_point, scheme) == before
    return replace(base, packed=pack_codes(torch.where(same, base.codes(), codes), scheme.bits))


def _random_codes(
    groups: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    base: QuantizedTensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """One of the two codes around each weight, the nearer one more often: uint8 ``[n, group]``, right on average."""
    scheme = base.scheme
    scaled = groups * reciprocal(scale).unsqueeze(1)
    draw = torch.rand(scaled.shape, generator=generator, device=scaled.device)
    if scheme.grid == "int":
        shift = scheme.implied_zero_point if zero is None else zero.unsqueeze(1)
        # a weight on the grid stays there: its own rounding errors are far below this
        exact = (scaled + shift + 1e-4).floor()
        part = (scaled + shift - exact).clamp_(min=0)
        return (exact + (draw < part)).clamp_(0, 2**scheme.bits - 1).to(torch.uint8)
    values, order = levels(scheme.grid, scaled.device).sort(stable=True)
    upper = torch.searchsorted(values, scaled.contiguous()).clamp_(1, len(values) - 1)
    low, high = values[upper - 1], values[upper]
    part = (scaled - low) / (high - low).clamp_(min=torch.finfo(torch.float32).tiny)
    return order[torch.where(draw < part, upper, upper - 1)].to(torch.uint8)


def _group_errors(tensor: QuantizedTensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error per group: float32 ``[out, groups]``."""
    difference = tensor.dequantize().sub_(target).square_()
    return difference.view(target.shape[0], -1, tensor.scheme.group(target.shape[1])).sum(-1)
