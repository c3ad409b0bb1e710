"""End-to-end tuning: scales, norms and biases are trained so that the quantized model answers as the float model does.

The codes stay as they are. What is trained is one factor per scale, and the float vectors (norms, biases); the loss is
KL(float || quantized) of the next-token distributions, or for models without an output head the squared error of their
last hidden states. This is the last phase of EfficientQAT (arXiv:2407.11062) with a teacher instead of labels. Samples
held out from training decide how long it goes on and whether its result is kept at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from hf_quant.calibration.data import CalibrationData, batch_samples
from hf_quant.nn.forwards import multiplying
from hf_quant.plan import Plan
from hf_quant.quantize.contracts import Weights
from hf_quant.quantize.objective import Objective, find_objective
from hf_quant.quantize.rounding import values
from hf_quant.tensor import QuantizedTensor

HELD_OUT = 8  # one sample of so many decides, and is not trained on
CHECKS = 8  # looks at the held-out samples
PATIENCE = 3  # looks without progress after which training stops
WARM_UP = 0.05  # share of the steps
VECTORS = 0.1  # learning rate of norms and biases, as a share of that of the scales
_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class TuningStep:
    """One optimizer step is done.

    Attributes:
        step: of ``steps``.
        loss: on the samples of this step.
        held_out: the last look at the held-out samples.
        start: the first one, before training.
    """

    step: int
    steps: int
    loss: float
    held_out: float
    start: float
    seconds: float


class _Scaled(torch.autograd.Function):
    """y = x @ (codes * scale * factor)^T, with a gradient for the factor; the float weight is made when needed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: torch.Tensor, layer: ScaledLayer) -> torch.Tensor:
        ctx.layer = layer
        x = x.to(layer.compute)
        ctx.save_for_backward(x, factor)
        return linear(x, layer.weight(factor).to(layer.compute)).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, factor = ctx.saved_tensors
        grad = grad.to(x.dtype)
        slope = (grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])).to(torch.float32)
        return (grad @ ctx.layer.weight(factor).to(x.dtype)).to(torch.float32), ctx.layer.slope(slope), None


class ScaledLayer:
    """A quantized weight whose scales can be multiplied by a trained factor ``[out, groups]``."""

    def __init__(self, tensor: QuantizedTensor, device: torch.device) -> None:
        self.tensor = tensor
        self.compute = torch.float32  # of the matrix products
        rows, columns = tensor.shape
        self.groups = tensor.scheme.groups(columns)
        group = tensor.scheme.group(columns)
        zero = None if tensor.zero_point is None else tensor.zero_point.reshape(-1)
        exact = values(tensor.codes().reshape(-1, group), zero, tensor.scheme)
        # whole numbers from -255 to 255 fit bfloat16; the levels of a table do not
        kept = exact if tensor.scheme.grid != "int" else exact.to(torch.bfloat16)
        self.values = kept.view(rows, self.groups, group).to(device)
        self.scale = tensor.scales().to(device=device, dtype=torch.float32)
        self.factor = torch.ones_like(self.scale, requires_grad=True)

    def weight(self, factor: torch.Tensor) -> torch.Tensor:
        scale = self.scale * factor
        return (self.values.to(torch.float32) * scale.unsqueeze(-1)).flatten(1)

    def slope(self, gradient: torch.Tensor) -> torch.Tensor:
        """d loss / d factor from d loss / d weight ``[out, in]``."""
        grouped = gradient.view_as(self.values)
        return (grouped * self.values).sum(-1) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _Scaled.apply(x, self.factor, self)
        return found

    @torch.no_grad()
    def stored(self) -> QuantizedTensor:
        """The tensor with its scales as they are now, in the dtype in which they are stored."""
        tensor = self.tensor
        assert tensor.scale is not None
        limit = torch.finfo(tensor.scale.dtype).max
        scale = (self.scale * self.factor).clamp(-limit, limit).to(tensor.scale.dtype)
        return replace(tensor, scale=scale.to(tensor.device))


def distill(
    model: nn.Module,
    plan: Plan,
    data: CalibrationData,
    weights: Weights,
    tensor: Callable[[str], QuantizedTensor],
    tuning: Mapping[str, Any],
    *,
    progress: Callable[[TuningStep], None] | None = None,
) -> tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]:
    """Train scales, norms and biases.

    Args:
        model: float32, in eval mode; the planned layers may be placeholders. It is left as it was.
        plan: made for this model.
        data: what to train on; one sample of eight is held out.
        weights: the float weights, for the float model's answers.
        tensor: the quantized weight of a layer.
        tuning: ``steps``, ``learning_rate``, ``batch``.
        progress: called after every step.

    Returns:
        New tensors of the quantized layers, and the float vectors that changed, by parameter name; both empty when
        training did not help on the held-out samples. Scales that are stored double-quantized are not trained.
    """
    return _Tuner(model, plan, data, tensor, tuning, progress or (lambda step: None)).run(weights)


class _Tuner:
    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        data: CalibrationData,
        tensor: Callable[[str], QuantizedTensor],
        tuning: Mapping[str, Any],
        progress: Callable[[TuningStep], None],
    ) -> None:
        self.model, self.plan, self.tensor, self.progress = model, plan, tensor, progress
        self.device = next(model.parameters()).device
        self.steps, self.rate = int(tuning["steps"]), float(tuning["learning_rate"])
        self.batch = int(tuning["batch"])
        # gradients are noisy anyway; what is judged and kept is computed in float32
        self.narrow = torch.bfloat16 if multiplies_bfloat16(self.device) else torch.float32
        train, held_out = data.split(max(1, data.samples // HELD_OUT))
        self.train, self.held_out = _singles(train), _singles(held_out)
        self.started = time.perf_counter()

    def run(self, weights: Weights) -> tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]:
        everything = [*self.train, *self.held_out]
        names = {layer.name for layer in self.plan.quantized}
        with torch.no_grad(), self._float_layers(weights):
            objective = find_objective(self.model, names, self._on_device(everything[0]))
            answers = [objective.answer(self._on_device(sample)) for sample in everything]
        teacher = list(zip(everything, answers, strict=True))
        train, held_out = teacher[: len(self.train)], teacher[len(self.train) :]
        layers = {layer.name: ScaledLayer(self.tensor(layer.name), self.device) for layer in self.plan.quantized}
        scaled = {name: layer for name, layer in layers.items() if layer.tensor.nested is None}
        vectors = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.ndim == 1 and parameter.is_floating_point() and torch.any(parameter != 0)
        }
        before = {name: parameter.detach().clone() for name, parameter in vectors.items()}
        frozen = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        try:
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            for parameter in vectors.values():
                parameter.requires_grad_(True)
            with multiplying(self.model, {name: layer.forward for name, layer in layers.items()}):
                best = self._train(objective, train, held_out, scaled, vectors)
                if best is None:
                    return {}, {}
                return {name: layer.stored() for name, layer in scaled.items()}, best
        finally:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if name in before:
                        parameter.copy_(before[name])
                    parameter.requires_grad_(frozen[name])
                    parameter.grad = None

    def _train(
        self,
        objective: Objective,
        train: list[tuple[dict[str, torch.Tensor], torch.Tensor]],
        held_out: list[tuple[dict[str, torch.Tensor], torch.Tensor]],
        layers: Mapping[str, ScaledLayer],
        vectors: Mapping[str, nn.Parameter],
    ) -> dict[str, torch.Tensor] | None:
        """Leaves the best factors in the layers; returns the best vectors, or None when the start was best."""
        factors = [layer.factor for layer in layers.values()]
        groups: list[dict[str, Any]] = [{"params": factors, "peak": self.rate}]
        for vector in vectors.values():
            size = float(vector.detach().square().mean().sqrt())
            groups.append({"params": [vector], "peak": self.rate * VECTORS * size})
        optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=0.0, betas=_BETAS)
        start = latest = best = self._judge(objective, held_out, layers)
        kept: tuple[list[torch.Tensor], dict[str, torch.Tensor]] | None = None
        since = 0
        order = _order(len(train), self.steps * self.batch)
        look = max(1, self.steps // CHECKS)
        for step in range(1, self.steps + 1):
            share = (
                min(1.0, step / max(1.0, WARM_UP * self.steps))
                * 0.5
                * (1 + math.cos(math.pi * (step - 1) / self.steps))
            )
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            loss = 0.0
            self._compute_in(layers, self.narrow)
            for _ in range(self.batch):
                sample, answer = train[next(order)]
                loss += objective.backward(self._on_device(sample), answer, 1 / self.batch) / self.batch
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % look == 0 or step == self.steps:
                latest = self._judge(objective, held_out, layers)
                since += 1
                if latest < best:
                    best, since = latest, 0
                    kept = (
                        [factor.detach().clone() for factor in factors],
                        {name: vector.detach().clone() for name, vector in vectors.items()},
                    )
            self.progress(TuningStep(step, self.steps, loss, latest, start, time.perf_counter() - self.started))
            if since >= PATIENCE:
                break
        if kept is None:
            return None
        with torch.no_grad():
            for factor, value in zip(factors, kept[0], strict=True):
                factor.copy_(value)
        return kept[1]

    @torch.no_grad()
    def _judge(
        self,
        objective: Objective,
        held_out: list[tuple[dict[str, torch.Tensor], torch.Tensor]],
        layers: Mapping[str, ScaledLayer],
    ) -> float:
        """Mean loss on the held-out samples, with the scales rounded as they would be stored."""
        exact = {name: layer.factor.detach().clone() for name, layer in layers.items()}
        for layer in layers.values():
            rounded = layer.stored().scales().to(device=self.device, dtype=torch.float32)
            layer.factor.copy_(torch.where(layer.scale != 0, rounded / layer.scale, 1.0))
        self._compute_in(layers, torch.float32)
        try:
            losses = [objective.loss(self._on_device(sample), answer) for sample, answer in held_out]
        finally:
            for name, layer in layers.items():
                layer.factor.copy_(exact[name])
        return sum(losses) / len(losses)

    @staticmethod
    def _compute_in(layers: Mapping[str, ScaledLayer], dtype: torch.dtype) -> None:
        for layer in layers.values():
            layer.compute = dtype

    def _on_device(self, sample: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device) for name, value in sample.items()}

    @contextmanager
    def _float_layers(self, weights: Weights) -> Iterator[None]:
        """Inside, the layers run with their float weights, which are all in memory meanwhile."""
        held = {layer.name: weights.weight(layer).to(self.device) for layer in self.plan.quantized}
        with multiplying(self.model, {name: partial(_multiply, weight) for name, weight in held.items()}):
            yield


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are faster than float32 ones."""
    if device.type != "cpu":
        return True
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def _multiply(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return linear(x, weight)


def _singles(data: CalibrationData) -> list[dict[str, torch.Tensor]]:
    """One sample at a time: activations of a whole batch would have to be kept for the backward pass."""
    found = []
    for batch in data.batches:
        count = batch_samples(batch)
        if any(value.dim() == 0 or len(value) != count for value in batch.values()):
            found.append(dict(batch))  # patches of images, say, that do not say whose they are
            continue
        found += [{name: value[i : i + 1] for name, value in batch.items()} for i in range(count)]
    return found


def _order(samples: int, needed: int) -> Iterator[int]:
    """Indices of samples, every one as often as any other, reshuffled for each round; the same on every run."""
    generator = torch.Generator().manual_seed(0)
    rounds = -(-needed // samples)
    for _ in range(rounds):
        yield from torch.randperm(samples, generator=generator).tolist()
