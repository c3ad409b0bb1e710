"""Where factors can be folded: found by trying on one block of every kind, without knowing any architecture.

Candidates come from running one sample through the block: a module with a vector of weights whose output is the very
input of layers to be quantized, or two layers of one parent whose widths fit. Each is then tried with random factors,
and kept only if the block's output stays what it was. At the end all of them are tried at once on the whole model:
blocks of one class may differ, and may read each other's keys and values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from hf_quant.nn.forwards import bias_of, replaced_forwards
from hf_quant.plan import PlannedLayer
from hf_quant.quantize.blocks import Block, find_blocks
from hf_quant.quantize.contracts import Weights
from hf_quant.quantize.streams import Stream, explained, uncached, watched

CANCELLED = 1e-3  # share of the effect of a trial's factors that may remain once they are taken back
HELD = 0.01  # relative difference of a layer's inputs, all sites tried at once: rounding grows with depth
LOUD = 2.0**10  # a pair also has to hold with values so much larger, which a clamp (of clip_qkv, say) would cut off
TOKENS = 64  # of a text, for a trial
_SIGMA = 0.5  # of the logarithm of a trial's factors
logger = logging.getLogger("hf_quant")


@dataclass(frozen=True)
class Site:
    """A place for factors, by names below a block (or, once it is placed, in the model).

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

    def placed(self, block: str) -> Site:
        """The same, with names in the model."""
        consumers = tuple(f"{block}.{name}" for name in self.consumers)
        return replace(self, producer=f"{block}.{self.producer}", consumers=consumers)


@torch.no_grad()
def find_sites(
    model: nn.Module,
    layers: Sequence[PlannedLayer],
    weights: Weights,
    sample: Mapping[str, torch.Tensor],
    source: str = "the sample",
) -> list[Site]:
    """Every place of a model, in its order; arguments and errors as for :func:`hf_quant.quantize.fold.find_folds`."""
    named = {layer.name: layer for layer in layers}
    blocks = find_blocks(model, list(named))
    first: dict[str, Block] = {}
    for block in blocks:
        first.setdefault(block.kind, block)
    short = _beginning(sample)
    with explained(model, source):
        calls = _calls(model, named, weights, first.values(), short)
    kinds = {
        kind: _Trial(model, block, named, weights, calls[block.name]).sites() if block.name in calls else []
        for kind, block in first.items()
    }
    sites = [site.placed(block.name) for block in blocks for site in kinds[block.kind]]
    norms = [site for site in sites if site.norm]
    for some in (sites, norms) if len(norms) < len(sites) else (sites,):
        with explained(model, source):
            failing = _failing(model, named, weights, some, short)
        if failing is None:
            return some
        logger.info("%d places for factors do not hold together: the input of %s changes", len(some), failing)
    return []


def _beginning(sample: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The first tokens of a sample that is nothing but text without padding; any other as it is."""
    mask = sample.get("attention_mask")
    if not sample.keys() <= {"input_ids", "attention_mask"} or (mask is not None and not mask.all()):
        return sample
    return {name: value[:, :TOKENS] for name, value in sample.items()}


def _failing(
    model: nn.Module,
    layers: Mapping[str, PlannedLayer],
    weights: Weights,
    sites: Sequence[Site],
    sample: Mapping[str, torch.Tensor],
) -> str | None:
    """The first layer whose input is another one when all sites have random factors; None when there is none."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    factors = [_random(site, generator).to(device) for site in sites]
    tried = list(zip(sites, factors, strict=True))
    columns = {name: factor[site.channel.to(device)] for site, factor in tried for name in site.consumers}
    rows = {site.producer: factor for site, factor in tried if not site.norm}
    norms = [(model.get_submodule(site.producer), site, factor) for site, factor in tried if site.norm]
    moved = {name: value.to(device) for name, value in sample.items()}
    plain, folded = (Stream(lambda: model(**moved)) for _ in range(2))
    try:
        with uncached(model), watched(model, layers):
            plain.advance()
            with _divided(norms):
                folded.advance()
            while plain.layer is not None:
                name, x, found = plain.layer, plain.inputs, folded.inputs
                if folded.layer != name or x is None or found is None or x.shape != found.shape:
                    return name
                scaled = found * columns[name] if name in columns else found
                if not (scaled - x).norm() <= HELD * x.norm():
                    return name
                weight, bias = weights.weight(layers[name]).to(device, x.dtype), bias_of(model.get_submodule(name))
                plain.advance(linear(x, weight, bias))
                with _divided(norms):
                    output = linear(scaled, weight, bias)
                    folded.advance(output / rows[name] if name in rows else output)
    finally:
        plain.close()
        folded.close()
    return None


def _random(site: Site, generator: torch.Generator) -> torch.Tensor:
    """Factors for a trial: float32, one per channel of the producer."""
    return torch.exp(_SIGMA * torch.randn(int(site.channel.max()) + 1, generator=generator))


@contextmanager
def _divided(norms: Iterable[tuple[nn.Module, Site, torch.Tensor]]) -> Iterator[None]:
    """Inside, norms give their outputs divided by the factors."""
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for module, site, factors in norms:
            for parameter, offset in ((module.weight, float(site.plus_one)), (bias_of(module), 0.0)):
                if isinstance(parameter, torch.Tensor):
                    before.append((parameter, parameter.data))
                    parameter.data = ((parameter.data + offset) / factors - offset).to(parameter.dtype)
        yield
    finally:
        for parameter, data in reversed(before):
            parameter.data = data


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
    device = next(model.parameters()).device
    stream = Stream(lambda: model(**{name: value.to(device) for name, value in sample.items()}))
    try:
        with uncached(model), watched(model, layers):
            stream.advance()
            while stream.layer is not None and wanted - found.keys():
                assert stream.inputs is not None
                weight = weights.weight(layers[stream.layer]).to(device, stream.inputs.dtype)
                stream.advance(linear(stream.inputs, weight, bias_of(model.get_submodule(stream.layer))))
    finally:
        stream.close()
        for hook in hooks:
            hook.remove()
    return found


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
        self.idle: set[str] = set()  # modules with parameters that did not run: they may read a norm another time
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
            factors = _random(site, self.generator).to(self.plain.device)
            effect = self._difference(site, factors, False)
            trials = (factors,) if site.norm else (factors, factors / LOUD)
            if effect > 0 and all(self._difference(site, trial, True) <= CANCELLED * effect for trial in trials):
                kept.append(site)
        return kept

    def _norms(self) -> Iterator[Site]:
        if self.idle:
            return
        for norm in dict.fromkeys(self.sources[name] for name in self.order if name in self.sources):
            consumers = tuple(dict.fromkeys(name for name in self.order if self.sources.get(name) == norm))
            width = len(self.module.get_submodule(norm).weight)  # type: ignore[arg-type]
            for plus_one in (False, True):
                yield Site(norm, consumers, torch.arange(width), True, plus_one)

    def _head(self, parent: str) -> int | None:
        """Channels of a head of an attention."""
        found = getattr(self.module.get_submodule(parent), "head_dim", getattr(self.config, "head_dim", None))
        if isinstance(found, int):
            return found
        count, hidden = (getattr(self.config, key, None) for key in ("num_attention_heads", "hidden_size"))
        return hidden // count if isinstance(count, int) and isinstance(hidden, int) and count else None

    def _pairs(self) -> Iterator[Site]:
        order = list(dict.fromkeys(self.order))
        for index, consumer in enumerate(order):
            columns = self.weights[consumer].shape[1]
            # the nearest one before is the likeliest
            for producer in reversed(order[:index]):
                rows = self.weights[producer].shape[0]
                parent = producer.rpartition(".")[0]
                if parent != consumer.rpartition(".")[0] or columns % rows:
                    continue
                if columns == rows:
                    yield Site(producer, (consumer,), torch.arange(columns), False)
                elif (
                    heads := self._head(parent)
                ) and rows % heads == 0:  # key and value heads shared by several query heads
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

        def started(name: str) -> Callable[..., None]:
            return lambda module, args: self.idle.discard(name)

        hooks = []
        for name, module in self.module.named_modules():
            if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
                continue  # never runs
            if name in self.weights or next(module.parameters(recurse=False), None) is not None:
                self.idle.add(name)
                hooks.append(module.register_forward_pre_hook(started(name)))
            if name not in self.weights and not list(module.children()) and _vector(module) is not None:
                hooks.append(module.register_forward_hook(produced(name)))

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
        rows = {site.producer: factors} if taken_back and not site.norm else {}
        norm = [(self.module.get_submodule(site.producer), site, factors)] if taken_back and site.norm else []
        with _divided(norm):
            found = self._run(columns, rows, None)
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
            output = linear(inputs, self.weights[name].to(x.dtype), bias_of(self.module.get_submodule(name)))
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
