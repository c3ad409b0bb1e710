"""How much KL each scheme of each linear layer costs, from one pass over calibration data: diagonal Fisher information.

To second order, moving the weights of a layer by dW costs KL(float || quantized) = 1/2 E[<dW, G>^2] nats, where G is
the gradient of -log p(label) with respect to the weight and the label is drawn from the model's own distribution, not
from the data (the true Fisher information, Martens, arXiv:1412.1193). Rounding errors of different weights are close to
independent, which leaves 1/2 sum_oj E[G_oj^2] dW_oj^2. G is the gradient summed over a sequence, so what a change does
through other positions counts. (Kronecker factors E[g g^T] x E[x x^T] take positions for independent: on SmolLM2 they
were off by up to a factor of four for value projections, where this was within a factor of two of the measured KL.)

Only a sample of each layer's rows (output channels) is looked at, and scaled up by the rows' share of E[g^2], which is
known for all of them: that bounds memory to ``rows x in`` floats a layer, twice, and makes weighing a scheme cheap.
No gradient of a weight is ever held whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from hf_quant.errors import SensitivityError
from hf_quant.grids import Scheme
from hf_quant.quantize.menu import LayerMenu, Menu
from hf_quant.quantize.sensitivity_record import LayerSensitivity, Sensitivity, model_digest
from hf_quant.quantize.weight import quantize_weight

ROWS = 128
SAMPLES = 8
Progress = Callable[[int, int], None]


class Data(Protocol):
    """What is needed of :class:`hf_quant.calibration.data.CalibrationData`."""

    @property
    def batches(self) -> tuple[dict[str, torch.Tensor], ...]: ...

    @property
    def sha256(self) -> str: ...


@dataclass
class _Statistics:
    """One layer's running sums; ``rows`` is the sample of its output channels."""

    rows: torch.Tensor
    all_rows: bool
    gradient: torch.Tensor | None = None  # of the sequence in hand [rows, in]
    fisher: torch.Tensor | None = None  # sum over sequences of gradient^2 [rows, in]
    inputs: torch.Tensor | None = None  # sum of x^2 [in]
    outputs: torch.Tensor | None = None  # sum of g^2 [out]
    tokens: int = 0


@dataclass
class _Loss:
    """What the gradients are of; ``kind`` is None until the first output was seen."""

    generator: torch.Generator
    kind: str | None = None
    tokens: int = 0


def settings(samples: int = SAMPLES, draws: int = 1, rows: int = ROWS, seed: int = 0) -> dict[str, Any]:
    """The estimator's settings as :meth:`Sensitivity.check` compares them."""
    return {"method": "diagonal-fisher", "samples": samples, "draws": draws, "rows": rows, "seed": seed}


def estimate_sensitivity(
    model: nn.Module,
    data: Data,
    menu: Menu,
    *,
    samples: int = SAMPLES,
    draws: int = 1,
    rows: int = ROWS,
    seed: int = 0,
    scale_dtype: torch.dtype = torch.bfloat16,
    digest: str | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """The predicted KL, in nats per token, of every scheme in ``menu`` for every layer alone.

    A model whose output has ``logits`` over at least two classes is measured by them. One without (an encoder) has no
    distribution: then the figure is half the mean squared error of its first output relative to that output's
    variance, estimated with random projections, and the record says ``loss: projection``.

    Args:
        model: a transformers model with float weights, in evaluation mode or not (it is left as it was).
        data: calibration batches, the keyword arguments of ``model.forward``.
        menu: the layers and their schemes.
        samples: sequences (images, clips) used, the first of the data; one at a time.
        draws: labels drawn per position, each with a backward pass of its own; more of them mean less noise.
        rows: output channels looked at in each layer.
        seed: of labels and rows.
        scale_dtype: of the scales on the int grid.
        digest: of the model, when the caller has it; else it is computed.
        progress: called with (passes done, passes in all).

    Raises:
        SensitivityError: no data, no gradient reaches any layer, or a gradient is NaN or Inf.
    """
    taken = take_samples(data.batches, samples)
    if not taken:
        raise SensitivityError("there is no calibration data.", "give at least one sample.")
    found = {layer.name: _Statistics(*_rows(layer, rows, seed + i)) for i, layer in enumerate(menu.layers)}
    loss = _Loss(torch.Generator().manual_seed(seed))
    device = next(model.parameters()).device
    with _outputs_only(model), _hooked(model, found):
        for done, sample in enumerate(taken):
            _one_sample(model, {k: _to(v, device) for k, v in sample.items()}, found, loss, draws)
            if progress is not None:
                progress(done + 1, len(taken))
    if not any(statistics.tokens for statistics in found.values()):
        raise SensitivityError(
            f"no gradient of the output of {type(model).__name__} reaches its linear layers.",
            "check that the calibration batches are what its forward() takes.",
        )
    layers = {}
    for layer in menu.layers:
        layers[layer.name] = _weigh(layer, model, found.pop(layer.name), loss.tokens * draws, scale_dtype)
    _lend(layers)
    estimator = {**settings(samples, draws, rows, seed), "loss": loss.kind, "tokens": loss.tokens}
    return Sensitivity(digest or model_digest(model), data.sha256, estimator, layers)


def _rows(layer: LayerMenu, rows: int, seed: int) -> tuple[torch.Tensor, bool]:
    out = layer.shape[0]
    if out <= rows:
        return torch.arange(out), True
    return torch.randperm(out, generator=torch.Generator().manual_seed(seed))[:rows].sort().values, False


def take_samples(batches: Sequence[Mapping[str, torch.Tensor]], samples: int) -> list[dict[str, torch.Tensor]]:
    """The first samples, each as a batch of one; a batch whose tensors differ in length is taken whole.

    Samples of several kinds (images with text, and text alone) take turns, the kind with the most inputs first.
    """
    kinds: dict[frozenset[str], list[dict[str, torch.Tensor]]] = {}
    for batch in batches:
        sizes = {value.shape[0] if value.ndim else 0 for value in batch.values()}
        size = sizes.pop() if len(sizes) == 1 else 0
        pieces = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(size)] if size else [dict(batch)]
        taken = kinds.setdefault(frozenset(batch), [])
        taken += pieces[: samples - len(taken)]
    rounds = zip_longest(*sorted(kinds.values(), key=lambda taken: -len(taken[0])))
    return [sample for turn in rounds for sample in turn if sample is not None][:samples]


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def _outputs_only(model: nn.Module) -> Iterator[None]:
    """Gradients flow through the model but no parameter collects one; everything is put back afterwards."""
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    try:
        model.eval()
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        if cache:
            config.use_cache = False
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in parameters:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        if cache:
            config.use_cache = cache


@contextlib.contextmanager
def _hooked(model: nn.Module, found: Mapping[str, _Statistics]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_hook(_hook(name, found[name])) for name in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, statistics: _Statistics) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
    def forward(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0].detach()
        version = x._version
        if not output.requires_grad:
            # nothing below requires a gradient, so the graph begins here; a copy, as some models write into outputs
            output = output.requires_grad_(True).clone()

        def backward(gradient: torch.Tensor) -> None:
            if x._version != version:
                raise SensitivityError(
                    f"the model overwrites the input of {name} after the layer has read it.",
                    "skip this layer, or quantize without a budget.",
                )
            _add(statistics, x.reshape(-1, x.shape[-1]).float(), gradient.reshape(-1, gradient.shape[-1]).float())

        output.register_hook(backward)
        return output

    return forward


def _add(statistics: _Statistics, x: torch.Tensor, gradient: torch.Tensor) -> None:
    """One call of a layer: x ``[n, in]``, gradient of its output ``[n, out]``."""
    square = gradient.square()
    used = square.sum(1) > 0  # positions that the loss does not depend on (padding) say nothing
    picked = gradient if statistics.all_rows else gradient[:, statistics.rows.to(gradient.device)]
    weight_gradient = picked.t() @ x
    inputs = (x.square() * used.unsqueeze(1)).sum(0)
    outputs = square.sum(0)
    for name, value in (("gradient", weight_gradient), ("inputs", inputs), ("outputs", outputs)):
        before = getattr(statistics, name)
        setattr(statistics, name, value if before is None else before.add_(value))
    statistics.tokens += int(used.sum())


def _one_sample(
    model: nn.Module, sample: dict[str, Any], found: Mapping[str, _Statistics], loss: _Loss, draws: int
) -> None:
    outputs = model(**sample)
    for draw in range(draws):
        value, tokens = _value(outputs, sample, loss)
        if not value.requires_grad:
            raise SensitivityError(
                f"the output of {type(model).__name__} does not depend on the linear layers of the budget.",
                "check that it computes with gradients (no torch.no_grad inside).",
            )
        value.backward(retain_graph=draw + 1 < draws)
        if draw == 0:
            loss.tokens += tokens
        for name, statistics in found.items():
            if statistics.gradient is None:
                continue
            square = statistics.gradient.square_()
            if not bool(torch.isfinite(square).all()):
                raise SensitivityError(
                    f"the gradient of {name} is NaN or Inf.",
                    "load the model in float32 or bfloat16, or mend its weights.",
                )
            statistics.fisher = square if statistics.fisher is None else statistics.fisher.add_(square)
            statistics.gradient = None


def _value(outputs: Any, sample: Mapping[str, Any], loss: _Loss) -> tuple[torch.Tensor, int]:
    """A scalar whose gradient has the Fisher information as its second moment, and the positions it sums over."""
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, torch.Tensor) and logits.shape[-1] > 1:
        loss.kind = "sampled labels"
        flat = _kept(logits, sample).float()
        probabilities = flat.detach().softmax(-1)
        if not bool(torch.isfinite(probabilities).all()):
            raise SensitivityError("the float model's logits are NaN or Inf.", "mend its weights, or use float32.")
        # drawn on the CPU: the same seed gives the same labels on every device
        labels = torch.multinomial(probabilities.cpu(), 1, generator=loss.generator).squeeze(1).to(flat.device)
        return functional.cross_entropy(flat, labels, reduction="sum"), flat.shape[0]
    loss.kind = "projection"
    values = outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs
    values = values if isinstance(values, (tuple, list)) else (values,)
    hidden = next((v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim >= 2), None)
    if hidden is None:
        raise SensitivityError("the model's output has no floating tensor to measure.", "use a model with logits.")
    flat = _kept(hidden, sample).float()
    signs = torch.randint(0, 2, flat.shape, generator=loss.generator).mul_(2).sub_(1).to(flat)
    scale = float(flat.detach().std()) * math.sqrt(flat.shape[-1])
    return (flat * signs).sum() / max(scale, torch.finfo(torch.float32).tiny), flat.shape[0]


def _kept(values: torch.Tensor, sample: Mapping[str, Any]) -> torch.Tensor:
    """``[positions, n]`` without padding, where a mask of the output's shape says what padding is."""
    for key in ("decoder_attention_mask", "attention_mask"):
        mask = sample.get(key)
        if isinstance(mask, torch.Tensor) and mask.shape == values.shape[:-1]:
            return values[mask.bool()]
    return values.reshape(-1, values.shape[-1])


@torch.no_grad()
def _weigh(
    layer: LayerMenu, model: nn.Module, statistics: _Statistics, draws: int, scale_dtype: torch.dtype
) -> LayerSensitivity:
    """1/2 sum F dW^2 per token for each scheme, over the sampled rows, scaled up to all rows."""
    schemes = [choice.scheme for choice in layer.choices if choice.scheme is not None]
    if statistics.fisher is None or statistics.inputs is None or statistics.outputs is None or not statistics.tokens:
        return LayerSensitivity(layer.shape, 0, {scheme.label: math.nan for scheme in schemes})
    module = model.get_submodule(layer.name)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows = statistics.rows.to(weight.device)
    sample = (weight[:, rows].t() if layer.kind == "Conv1D" else weight[rows]).float().contiguous()
    seen = statistics.outputs[rows].sum()
    grow = float(statistics.outputs.sum() / seen) if seen > 0 else layer.shape[0] / len(rows)
    importance = statistics.inputs / statistics.inputs.mean()
    costs = {
        scheme.label: 0.5
        * grow
        * float(
            (_error(sample, scheme, scale_dtype, importance, layer.name) * statistics.fisher).sum(dtype=torch.float64)
        )
        / draws
        for scheme in schemes
    }
    return LayerSensitivity(layer.shape, statistics.tokens, costs)


def _error(
    weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: torch.Tensor, name: str
) -> torch.Tensor:
    floor = importance.clamp(min=1e-6)  # a column that was never active must still get finite scales
    found = quantize_weight(weight, scheme, "search", scale_dtype=scale_dtype, importance=floor, name=name)
    return found.dequantize().sub_(weight).square_()


def _lend(layers: dict[str, LayerSensitivity]) -> None:
    """Layers that no token reached (experts) take the mean cost per weight of their namesakes, or of all layers."""
    for name, layer in layers.items():
        if layer.tokens:
            continue
        leaf = name.rpartition(".")[2]
        seen = [other for other in layers.values() if other.tokens]
        kin = [layers[other] for other in layers if other.rpartition(".")[2] == leaf and layers[other].tokens] or seen
        size = layer.shape[0] * layer.shape[1]
        costs = {}
        for label in layer.costs:
            having = [other for other in kin if label in other.costs] or [o for o in seen if label in o.costs]
            if not having:
                raise SensitivityError(
                    f"no token of the calibration data reaches {name}, nor any layer like it.", "give more data."
                )
            weights = sum(other.shape[0] * other.shape[1] for other in having)
            costs[label] = sum(other.costs[label] for other in having) / weights * size
        layers[name] = LayerSensitivity(layer.shape, 0, costs)
