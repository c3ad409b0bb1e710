"""Function-preserving folds: input channels of a layer are rescaled, and what comes before takes the factors back.

A norm followed by linear layers computes the same with its output channel j divided by s_j and column j of those layers
multiplied by it; so do v_proj and o_proj (attention only averages the channels of v), and up_proj and down_proj (gated
MLPs are linear in the up branch). The factors are free (SmoothQuant, arXiv:2211.10438; AWQ, arXiv:2306.00978). Here
they make the columns of a layer equally large: the columns of a group share one scale, and a column
that is much smaller than its neighbours is rounded with steps that are too large for it. Whether that pays depends on
the inputs, too, and is decided for every place on held-out tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from hf_quant.calibration.statistics import token_rows
from hf_quant.nn.forwards import bias_of
from hf_quant.plan import PlannedLayer
from hf_quant.quantize.contracts import Weights
from hf_quant.quantize.fold_sites import Site, find_sites
from hf_quant.quantize.gptq import held_out_loss
from hf_quant.quantize.streams import Stream, explained, uncached, watched

SAMPLES = 6  # that decide, a third of them as held-out ones
POWERS = (1.0, 0.0)  # of the inverse size of a column: all or nothing
UNDECIDED = 0.5  # where no data reaches
LARGEST = 16.0  # factors stay between its inverse and itself, in units of their geometric mean
_DAMPING = 0.04
_ROWS = 64  # of a place's layers, by which it is judged
_FEW = 32  # tokens


@dataclass(frozen=True)
class Folds:
    """Factors of a whole model.

    Attributes:
        columns: layer -> float32 ``[in]``, what its columns are multiplied by.
        rows: layer -> float32 ``[out]``, what its rows are divided by.
        floats: parameter -> its new value: norms, and biases of layers whose rows are divided.
    """

    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    floats: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.floats.keys() | self.rows.keys())

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight ``[out, in]`` of a layer with its factors."""
        if name in self.columns:
            weight = weight * self.columns[name].to(weight.device)
        return weight / self.rows[name].unsqueeze(1).to(weight.device) if name in self.rows else weight

    @torch.no_grad()
    def into(self, model: nn.Module, layers: Sequence[PlannedLayer]) -> None:
        """Fold a model that has all its weights for good; what it computes stays the same."""
        for layer in layers:
            parameter = model.get_parameter(f"{layer.name}.weight")
            weight = parameter.t() if layer.kind == "Conv1D" else parameter
            weight.copy_(self.apply(layer.name, weight.to(torch.float32)))
        for name, value in self.floats.items():
            model.get_parameter(name).copy_(value)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model's norms and biases are the folded ones."""
        before = {name: model.get_parameter(name).data for name in self.floats}
        try:
            for name, value in self.floats.items():
                parameter = model.get_parameter(name)
                parameter.data = value.to(parameter.device, parameter.dtype)
            yield
        finally:
            for name, data in before.items():
                model.get_parameter(name).data = data


class FoldedWeights:
    """The weights of a model with its folds."""

    def __init__(self, weights: Weights, folds: Folds) -> None:
        self.weights, self.folds = weights, folds

    def weight(self, layer: PlannedLayer) -> torch.Tensor:
        return self.folds.apply(layer.name, self.weights.weight(layer))


@torch.no_grad()
def find_folds(
    model: nn.Module,
    layers: Sequence[PlannedLayer],
    weights: Weights,
    samples: Sequence[Mapping[str, torch.Tensor]],
    source: str = "the sample",
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Folds:
    """The factors of every place where there can be some.

    Args:
        model: float32, in eval mode; the layers may be placeholders that have a ``bias`` and nothing else.
        layers: what will be quantized.
        weights: their float weights.
        samples: keyword arguments of the model's forward, one sample each; the first ones decide.
        source: of the samples, for messages.
        scale_dtype: of the stored scales on the int grids.

    Returns:
        The folds; none for a model whose blocks leave no room for them.

    Raises:
        CalibrationError: the model does not run on the samples, or gives values that are not finite.
    """
    named = {layer.name: layer for layer in layers}
    sites = find_sites(model, layers, weights, samples[0], source)
    powers = _Choice(model, named, weights, sites, samples[:SAMPLES], scale_dtype).run(source)
    folds = Folds()
    for site in sites:
        power = powers.get(site.consumers[0], UNDECIDED)
        if power:
            _add(folds, model, site, _factors([weights.weight(named[name]) for name in site.consumers], site, power))
    return folds


def _factors(weights: Sequence[torch.Tensor], site: Site, power: float) -> torch.Tensor:
    """One per channel of a site's producer."""
    channels = int(site.channel.max()) + 1
    size = torch.zeros(channels)
    for weight in weights:
        pooled = torch.zeros(channels).index_add_(0, site.channel, weight.square().mean(0).cpu())
        size += pooled / pooled.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return balanced(size.sqrt(), power)


def _add(folds: Folds, model: nn.Module, site: Site, factors: torch.Tensor) -> None:
    """Factors of one site."""
    module: Any = model.get_submodule(site.producer)
    if site.norm:
        weight, offset = module.weight.detach().to("cpu", torch.float32), float(site.plus_one)
        # a norm that every loader's dtype holds exactly; the columns take what rounding it left
        rounded = ((weight + offset) / factors - offset).to(torch.bfloat16).to(torch.float32)
        factors = torch.where((rounded + offset) * (weight + offset) > 0, (weight + offset) / (rounded + offset), 1.0)
        folds.floats[f"{site.producer}.weight"] = torch.where(factors == 1.0, weight, rounded)
    else:
        folds.rows[site.producer] = factors
    bias = bias_of(module)
    if bias is not None:
        folds.floats[f"{site.producer}.bias"] = bias.detach().to("cpu", torch.float32) / factors
    for name in site.consumers:
        folds.columns[name] = factors[site.channel]


def balanced(size: torch.Tensor, power: float = 1.0) -> torch.Tensor:
    """Factors ``size ** -power``, one in the geometric mean; at 1 all channels become equal. 1 where it is 0."""
    used = size > 0
    if not used.any() or not torch.isfinite(size).all():
        return torch.ones_like(size)
    logs = torch.where(used, size.clamp(min=torch.finfo(torch.float32).tiny).log(), 0.0)
    middle = logs.sum() / used.sum()
    factors = (power * (middle - logs)).exp().clamp(1 / LARGEST, LARGEST)
    return torch.where(used, factors, 1.0)


class _Choice:
    """The power of every site, from one pass of the float model."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, PlannedLayer],
        weights: Weights,
        sites: Sequence[Site],
        samples: Sequence[Mapping[str, torch.Tensor]],
        scale_dtype: torch.dtype,
    ) -> None:
        self.model, self.layers, self.weights, self.samples = model, layers, weights, samples
        self.sites = {site.consumers[0]: site for site in sites}
        self.scale_dtype = scale_dtype
        self.device = next(model.parameters()).device

    def run(self, source: str) -> dict[str, float]:
        """First consumer of a site -> power; sites that no data reached are missing."""
        chosen: dict[str, float] = {}
        if len(self.samples) < 2 or not self.sites:
            return chosen
        rank = {name: index for index, name in enumerate(self.layers)}
        streams: list[Stream] = []
        try:
            with uncached(self.model), watched(self.model, self.layers), explained(self.model, source):
                streams = [Stream(self._forward(sample)) for sample in self.samples]
                for stream in streams:
                    stream.advance()
                while self.sites.keys() - chosen.keys():
                    waiting = {stream.layer for stream in streams if stream.layer is not None}
                    if not waiting:
                        break
                    name = min(waiting, key=rank.__getitem__)
                    weight = self.weights.weight(self.layers[name]).to(self.device)
                    if name in self.sites and name not in chosen:
                        chosen[name] = self._choose(self.sites[name], streams)
                    bias = bias_of(self.model.get_submodule(name))
                    for stream in [stream for stream in streams if stream.layer == name]:
                        assert stream.inputs is not None
                        stream.advance(linear(stream.inputs, weight.to(stream.inputs.dtype), bias))
        finally:
            for stream in streams:
                stream.close()
        return chosen

    def _forward(self, sample: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        moved = {name: value.to(self.device) for name, value in sample.items()}

        def run() -> None:
            self.model(**moved)

        return run

    def _choose(self, site: Site, streams: Sequence[Stream]) -> float:
        name = site.consumers[0]
        layer = self.layers[name]
        assert layer.scheme is not None
        width = layer.shape[1]
        hessians = [torch.zeros(width, width, device=self.device) for _ in range(2)]
        tokens = [0, 0]
        for index, (stream, sample) in enumerate(zip(streams, self.samples, strict=True)):
            if stream.layer != name or stream.inputs is None:
                continue
            mask = sample.get("attention_mask")
            fits = isinstance(mask, torch.Tensor) and mask.shape == stream.inputs.shape[:-1]
            rows = token_rows(stream.inputs, mask.to(self.device) if fits and mask is not None else None)
            part = int(3 * index >= 2 * len(streams))
            hessians[part].addmm_(rows.t(), rows)
            tokens[part] += len(rows)
        if min(tokens) < _FEW or not all(torch.isfinite(found.sum()) for found in hessians):
            return UNDECIDED  # the walk says what is wrong where values are not finite
        weights = [self.weights.weight(self.layers[consumer]).to(self.device) for consumer in site.consumers]
        together = torch.cat(weights)
        some = together[:: max(1, len(together) // _ROWS)]
        losses = []
        for power in POWERS:
            factors = _factors(weights, site, power)[site.channel].to(self.device)
            seen, held_out = (found / factors / factors.unsqueeze(1) for found in hessians)
            rows = (some * factors).contiguous()
            losses.append(held_out_loss(rows, layer.scheme, seen, held_out, name, _DAMPING, self.scale_dtype))
        return POWERS[losses.index(min(losses))]
