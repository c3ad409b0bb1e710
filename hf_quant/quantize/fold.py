"""Function-preserving folds: input channels of a layer are rescaled, and what comes before takes the factors back.

A norm followed by linear layers computes the same with its output channel j divided by s_j and column j of those layers
multiplied by it; so do v_proj and o_proj (attention only averages the channels of v), and up_proj and down_proj (gated
MLPs are linear in the up branch). The factors are free (SmoothQuant, arXiv:2211.10438; AWQ, arXiv:2306.00978). Here
they give all columns of a layer the same norm: the columns of a group share one scale, and a column that is much
smaller than its neighbours would be rounded with steps that are far too large for it.

No architecture is known here. Candidates are found by running one sample through one block of every kind: a module with
a vector of weights whose output is the very input of layers to be quantized, or two layers of one parent whose widths
fit. Each is then tried with random factors, and kept only if the block's output stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from hf_quant.nn.forwards import replaced_forwards
from hf_quant.plan import PlannedLayer
from hf_quant.quantize.blocks import Block, find_blocks
from hf_quant.quantize.contracts import Weights
from hf_quant.quantize.streams import Stream, explained, watched

LARGEST = 16.0  # factors stay between its inverse and itself, in units of their geometric mean
CANCELLED = 1e-3  # share of the effect of a trial's factors that may remain once they are taken back
_SIGMA = 0.5  # of the logarithm of a trial's factors


@dataclass(frozen=True)
class Site:
    """A place for factors, by names below the block.

    Attributes:
        producer: a norm, or a layer whose rows are divided.
        consumers: layers whose columns are multiplied.
        channel: int64 ``[in]``, the producer's channel that a column reads.
        plus_one: the norm multiplies by one plus its weight.
        norm: the producer is a norm.
    """

    producer: str
    consumers: tuple[str, ...]
    channel: torch.Tensor
    norm: bool
    plus_one: bool = False


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
    sample: Mapping[str, torch.Tensor],
    source: str = "the sample",
) -> Folds:
    """Factors that make the columns of every layer, where they can be folded, equally large.

    Args:
        model: float32, in eval mode; the layers may be placeholders that have a ``bias`` and nothing else.
        layers: what will be quantized.
        weights: their float weights.
        sample: keyword arguments of the model's forward: one short sample.
        source: of the sample, for messages.

    Returns:
        The folds; none for a model whose blocks leave no room for them.

    Raises:
        CalibrationError: the model does not run on the sample.
    """
    named = {layer.name: layer for layer in layers}
    blocks = find_blocks(model, list(named))
    first: dict[str, Block] = {}
    for block in blocks:
        first.setdefault(block.kind, block)
    with explained(model, source):
        calls = _calls(model, named, weights, first.values(), sample)
    folds = Folds()
    for kind, block in first.items():
        if block.name not in calls:
            continue
        sites = _Trial(model, block, named, weights, calls[block.name]).sites()
        for other in (other for other in blocks if other.kind == kind):
            for site in sites:
                _add(folds, model, other, site, named, weights)
    return folds


def _add(
    folds: Folds,
    model: nn.Module,
    block: Block,
    site: Site,
    layers: Mapping[str, PlannedLayer],
    weights: Weights,
) -> None:
    """The factors of one site of one block."""
    producer = f"{block.name}.{site.producer}"
    consumers = [f"{block.name}.{name}" for name in site.consumers]
    channels = int(site.channel.max()) + 1
    size = torch.zeros(channels)
    for name in consumers:
        square = folds.apply(name, weights.weight(layers[name])).square().mean(0).cpu()
        pooled = torch.zeros(channels).index_add_(0, site.channel, square)
        size += pooled / pooled.mean().clamp(min=torch.finfo(torch.float32).tiny)
    factors = balanced(size.sqrt())
    if site.norm:
        module: Any = model.get_submodule(producer)
        weight, offset = module.weight.detach().to("cpu", torch.float32), float(site.plus_one)
        # a norm that every loader's dtype holds exactly; the columns take what rounding it left
        rounded = ((weight + offset) / factors - offset).to(torch.bfloat16).to(torch.float32)
        factors = torch.where((rounded + offset) * (weight + offset) > 0, (weight + offset) / (rounded + offset), 1.0)
        folds.floats[f"{producer}.weight"] = torch.where(factors == 1.0, weight, rounded)
        bias = getattr(module, "bias", None)
    else:
        folds.rows[producer] = factors
        bias = getattr(model.get_submodule(producer), "bias", None)
    if isinstance(bias, torch.Tensor):
        folds.floats[f"{producer}.bias"] = bias.detach().to("cpu", torch.float32) / factors
    for name in consumers:
        folds.columns[name] = factors[site.channel]


def balanced(size: torch.Tensor) -> torch.Tensor:
    """Factors that make channels of ``size`` equally large, one in the geometric mean; 1 where the size is zero."""
    used = size > 0
    if not used.any() or not torch.isfinite(size).all():
        return torch.ones_like(size)
    logs = torch.where(used, size.clamp(min=torch.finfo(torch.float32).tiny).log(), 0.0)
    middle = logs.sum() / used.sum()
    factors = (middle - logs).exp().clamp(1 / LARGEST, LARGEST)
    return torch.where(used, factors, 1.0)


def _calls(
    model: nn.Module,
    layers: Mapping[str, PlannedLayer],
    weights: Weights,
    blocks: Iterable[Block],
    sample: Mapping[str, torch.Tensor],
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the model calls these blocks with: one pass, given up once the last of them was reached."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    wanted = {block.name for block in blocks}

    def entering(name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.setdefault(name, (args, dict(kwargs)))

        return enter

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(entering(name), with_kwargs=True) for name in sorted(wanted)
    ]
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    device = next(model.parameters()).device
    stream = Stream(lambda: model(**{name: value.to(device) for name, value in sample.items()}))
    try:
        if cached is not None:
            config.use_cache = False
        with watched(model, layers):
            stream.advance()
            while stream.layer is not None and wanted - found.keys():
                assert stream.inputs is not None
                weight = weights.weight(layers[stream.layer]).to(device, stream.inputs.dtype)
                stream.advance(linear(stream.inputs, weight, _bias(model.get_submodule(stream.layer))))
            stream.close()
    finally:
        for hook in hooks:
            hook.remove()
        if cached is not None:
            config.use_cache = cached
    return found


def _bias(module: nn.Module) -> torch.Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, torch.Tensor) else None


class _Trial:
    """One block with all its float weights, run with and without factors."""

    def __init__(
        self,
        model: nn.Module,
        block: Block,
        layers: Mapping[str, PlannedLayer],
        weights: Weights,
        call: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> None:
        self.module, self.call = model.get_submodule(block.name), call
        self.config: Any = getattr(model, "config", None)
        device = next(model.parameters()).device
        short = {name: name.removeprefix(f"{block.name}.") for name in block.layers}
        self.weights = {own: weights.weight(layers[name]).to(device) for name, own in short.items()}
        self.order: list[str] = []  # layers as they are used
        self.sources: dict[str, str] = {}  # layer -> the norm whose output is its input
        self.generator = torch.Generator().manual_seed(0)
        self.plain = self._learn()

    def sites(self) -> list[Site]:
        """Every candidate that holds; no norm, row or column is used twice."""
        kept: list[Site] = []
        for site in [*self._norms(), *self._pairs()]:
            taken = {name for other in kept for name in other.consumers}
            rows = {other.producer for other in kept}
            if site.producer in rows or taken & set(site.consumers) or self.plain is None:
                continue
            channels = int(site.channel.max()) + 1
            factors = torch.exp(_SIGMA * torch.randn(channels, generator=self.generator)).to(self.plain.device)
            effect = self._difference(site, factors, False)
            if effect > 0 and self._difference(site, factors, True) <= CANCELLED * effect:
                kept.append(site)
        return kept

    def _norms(self) -> Iterator[Site]:
        for norm in dict.fromkeys(self.sources[name] for name in self.order if name in self.sources):
            consumers = tuple(dict.fromkeys(name for name in self.order if self.sources.get(name) == norm))
            width = len(self.module.get_submodule(norm).weight)  # type: ignore[arg-type]
            for plus_one in (False, True):
                yield Site(norm, consumers, torch.arange(width), True, plus_one)

    def _pairs(self) -> Iterator[Site]:
        heads = getattr(self.config, "head_dim", None)
        if not isinstance(heads, int):
            count, hidden = (getattr(self.config, key, None) for key in ("num_attention_heads", "hidden_size"))
            heads = hidden // count if isinstance(count, int) and isinstance(hidden, int) and count else None
        order = list(dict.fromkeys(self.order))
        for index, consumer in enumerate(order):
            columns = self.weights[consumer].shape[1]
            # the nearest one before is the likeliest
            for producer in reversed(order[:index]):
                rows = self.weights[producer].shape[0]
                if producer.rpartition(".")[0] != consumer.rpartition(".")[0] or columns % rows:
                    continue
                if columns == rows:
                    yield Site(producer, (consumer,), torch.arange(columns), False)
                elif heads and rows % heads == 0:  # key and value heads shared by several query heads
                    column = torch.arange(columns)
                    head = column // heads // (columns // rows)
                    yield Site(producer, (consumer,), head * heads + column % heads, False)

    def _learn(self) -> torch.Tensor | None:
        """Run the block as it is, and see which norm's output each layer reads."""
        outputs: dict[int, tuple[str, torch.Tensor]] = {}

        def produced(name: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, torch.Tensor):
                    outputs[id(output)] = (name, output)

            return note

        hooks = [
            module.register_forward_hook(produced(name))
            for name, module in self.module.named_modules()
            if name not in self.weights and not list(module.children()) and _vector(module) is not None
        ]

        def seen(name: str, x: torch.Tensor) -> None:
            self.order.append(name)
            if id(x) in outputs:
                self.sources[name] = outputs[id(x)][0]

        try:
            return self._run({}, {}, seen)
        finally:
            for hook in hooks:
                hook.remove()

    def _difference(self, site: Site, factors: torch.Tensor, taken_back: bool) -> float:
        """Change of the block's output when columns are multiplied, and the producer divided or not."""
        columns = {name: factors[site.channel.to(factors.device)] for name in site.consumers}
        if not taken_back:
            found = self._run(columns, {}, None)
        elif not site.norm:
            found = self._run(columns, {site.producer: factors}, None)
        else:
            module: Any = self.module.get_submodule(site.producer)
            offset = float(site.plus_one)
            parameters = [(module.weight, (module.weight + offset) / factors - offset)]
            if isinstance(getattr(module, "bias", None), torch.Tensor):
                parameters.append((module.bias, module.bias / factors))
            before = [parameter.data for parameter, _ in parameters]
            try:
                for parameter, value in parameters:
                    parameter.data = value.to(parameter.dtype)
                found = self._run(columns, {}, None)
            finally:
                for (parameter, _), data in zip(parameters, before, strict=True):
                    parameter.data = data
        if found is None or self.plain is None:
            return float("inf")
        return float((found - self.plain).double().norm())

    def _run(
        self,
        columns: Mapping[str, torch.Tensor],
        rows: Mapping[str, torch.Tensor],
        seen: Callable[[str, torch.Tensor], None] | None,
    ) -> torch.Tensor | None:
        def forward(name: str, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if seen is not None:
                seen(name, x)
            inputs = x * columns[name] if name in columns else x
            output = linear(inputs, self.weights[name].to(x.dtype), _bias(self.module.get_submodule(name)))
            return output / rows[name] if name in rows else output

        pairs = [(self.module.get_submodule(name), partial(forward, name)) for name in self.weights]
        with replaced_forwards(pairs):
            args, kwargs = self.call
            output = self.module(*args, **kwargs)
        found = output[0] if isinstance(output, (tuple, list)) else output
        return found if isinstance(found, torch.Tensor) else None


def _vector(module: nn.Module) -> torch.Tensor | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, nn.Parameter) and weight.ndim == 1 else None
