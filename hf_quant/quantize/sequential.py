"""The walk: every layer is calibrated on what reaches it through the layers that are quantized already.

Two passes go through the model side by side for every batch: one with the float weights and one with the quantized
weights so far. Both stop at each layer to be quantized (:mod:`hf_quant.quantize.streams`). The layer's inputs in both
are summed up, its weight is aimed at the float model's output, rounded under the Hessian of the quantized inputs, and
both passes go on, each with its own weight. One float weight is in memory at a time; the activations of all batches are
those of a single point of the model.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from hf_quant.calibration.data import CalibrationData
from hf_quant.calibration.statistics import Moments, rows_of_same_tokens, token_rows
from hf_quant.errors import CalibrationError
from hf_quant.nn.experts import Routed
from hf_quant.nn.forwards import bias_of
from hf_quant.plan import Plan
from hf_quant.quantize.blocks import Block, find_blocks
from hf_quant.quantize.contracts import LayerResult, Progress, Record, Rungs, Weights
from hf_quant.quantize.gptq import DAMPINGS, Factor, best_damping, factorize, round_weight
from hf_quant.quantize.refit import refit_scales
from hf_quant.quantize.streams import Residual, Stream, Trace, explained, uncached, watched
from hf_quant.quantize.target import Target, correct
from hf_quant.quantize.weight import quantize_weight
from hf_quant.tensor import QuantizedTensor

logger = logging.getLogger("hf_quant")
CALIBRATED = "gptq"
FALLBACK = "search"
FEW_TOKENS = 32  # a layer that saw fewer is quantized without data
FEW = "calibration tokens reached it"
HELD_OUT = 8  # one batch of so many judges the corrections


@dataclass
class _Pair:
    """The two passes of one batch."""

    exact: Stream
    quantized: Stream
    mask: dict[tuple[int, ...], torch.Tensor]
    held_out: bool

    def at(self, layer: str) -> tuple[Stream, ...]:
        return tuple(stream for stream in (self.exact, self.quantized) if stream.layer == layer)


@dataclass
class _Shared:
    """Statistics of one input, kept while layers that read the same input follow each other."""

    unit: str
    inputs: list[weakref.ref[torch.Tensor]]  # weak: the tensors are large, and no longer needed once all have passed
    train: Moments
    held_out: Moments
    factors: dict[int, Factor] = field(default_factory=dict)  # by group size


def calibrate(
    model: nn.Module,
    plan: Plan,
    data: CalibrationData,
    weights: Weights,
    record: Record,
    *,
    progress: Callable[[Progress], None] | None = None,
    rungs: Rungs | None = None,
) -> list[LayerResult]:
    """Quantize every layer of the plan, in the order in which the model uses them, into ``record``.

    Args:
        model: float32, in eval mode; the planned layers may be placeholders that have a ``bias`` and nothing else.
        plan: made for this model.
        data: batches of keyword arguments of the model's forward.
        weights: the float weights of the planned layers.
        record: gets the quantized tensors; layers of units that it has already are not quantized again.
        progress: called after every layer.
        rungs: default all.

    Returns:
        One result per planned layer, in the order in which they were done; of a layer that was in the record before,
        only its name and method.

    Raises:
        CalibrationError: the model does not run on the data, or gives values that are not finite.
    """
    with torch.no_grad():
        return _Walk(model, plan, data, weights, record, progress, rungs or Rungs()).run()


class _Walk:
    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        data: CalibrationData,
        weights: Weights,
        record: Record,
        progress: Callable[[Progress], None] | None,
        rungs: Rungs,
    ) -> None:
        self.rungs = rungs
        self.model, self.plan, self.weights, self.record = model, plan, weights, record
        self.data = data
        if len(data.batches) == 1 and data.samples > 1:  # or nothing could be held out
            train, held_out = data.split(max(1, data.samples // HELD_OUT))
            self.data = replace(data, batches=train.batches + held_out.batches)
        self.progress = progress or (lambda step: None)
        self.layers = {layer.name: layer for layer in plan.quantized}
        self.rank = {name: index for index, name in enumerate(self.layers)}
        self.blocks = find_blocks(model, list(self.layers))
        self.unit_of = {name: name for name in self.layers}
        self.unit_of |= {name: block.name for block in self.blocks for name in block.layers}
        self.device = next(model.parameters()).device
        self.scale_dtype: torch.dtype = getattr(torch, plan.scale_dtype)
        self.done: dict[str, LayerResult] = {}
        self.tensors: dict[str, QuantizedTensor] = {}  # of units that are not in the record yet
        self.shared: _Shared | None = None
        self.residuals: dict[str, Residual] = {}
        self.lost: set[str] = set()
        self.repeated: set[str] = set()  # layers that one pass uses more than once
        self.outputs: dict[int, torch.Tensor] = {}  # of float passes that wait, by id, where they are known already
        self.active: Stream | None = None
        self.started = time.perf_counter()

    def run(self) -> list[LayerResult]:
        modules = [(self.model.get_submodule(block.name), block) for block in self.blocks]
        hooks = [m.register_forward_pre_hook(self._entering(block), with_kwargs=True) for m, block in modules]
        pairs: list[_Pair] = []
        try:
            with uncached(self.model), watched(self.model, self.layers):
                self._scout()
                pairs = [self._pair(index) for index in range(len(self.data.batches))]
                for pair in pairs:
                    for stream in (pair.exact, pair.quantized):
                        self._advance(stream, None)
                while len(self.done) < len(self.layers):
                    waiting = {s.layer for pair in pairs for s in (pair.exact, pair.quantized) if s.layer}
                    if not waiting:
                        break
                    self._visit(min(waiting, key=self.rank.__getitem__), pairs)
        finally:
            for pair in pairs:
                pair.exact.close()
                pair.quantized.close()
            for hook in hooks:
                hook.remove()
        for name in [name for name in self.layers if name not in self.done]:
            if self.record.finished(self.unit_of[name]):
                self._count(LayerResult(name, self.layers[name].method), resumed=True)
            else:
                self._quantize(name, None)
        for unit in dict.fromkeys(self.unit_of[name] for name in self.tensors):
            self._flush(unit)
        without = [name for name, result in self.done.items() if FEW in result.note]
        if without:
            few = f"{len(without)} layers saw fewer than {FEW_TOKENS} calibration tokens"
            logger.warning("%s and were quantized without data: %s", few, ", ".join(without))
        return list(self.done.values())

    def _visit(self, name: str, pairs: Sequence[_Pair]) -> None:
        """All passes that wait at a layer: quantize it if it is not yet, and send them on."""
        layer = self.layers[name]
        weight = self.weights.weight(layer).to(self.device)
        if name not in self.done:
            if self.record.finished(self.unit_of[name]):
                self._count(LayerResult(name, layer.method), resumed=True)
            else:
                self._leave_units(self.unit_of[name])
                wanted = layer.method == CALIBRATED
                self._quantize(name, self._statistics(name, pairs, weight) if wanted else None, weight)
        if len(self.done) == len(self.layers):
            return  # the rest of the model (its head, over a large vocabulary) has nothing to say
        rounded = (self.tensors[name] if name in self.tensors else self.record.tensor(name)).to(self.device)
        values = rounded.dequantize()
        bias = self._bias(name)
        for pair in pairs:
            for stream in pair.at(name):
                inputs = stream.inputs
                assert inputs is not None
                output = self.outputs.pop(id(stream), None)
                if output is None:
                    used = values if stream is pair.quantized else weight
                    output = linear(inputs, used.to(inputs.dtype), bias)
                self._advance(stream, output)

    def _statistics(self, name: str, pairs: Sequence[_Pair], weight: torch.Tensor) -> _Shared:
        """The moments of a layer's inputs; those of the layer before when both read the very same tensors."""
        present = [pair for pair in pairs if pair.quantized.layer == name]
        passing = (stream for pair in present for stream in pair.at(name))
        inputs = [stream.inputs for stream in passing if stream.inputs is not None]
        before = self.shared
        if (
            before is not None
            and before.unit == self.unit_of[name]  # or a resumed run, which has not seen it, would do something else
            and name not in self.residuals
            and before.train.residual is None
            and len(before.inputs) == len(inputs)
            and all(a() is b for a, b in zip(before.inputs, inputs, strict=True))
        ):
            return before
        self.shared = None
        width = self.layers[name].shape[1]
        train, held_out = Moments.zeros(width, self.device), Moments.zeros(width, self.device)
        for pair in present:
            seen = pair.quantized.inputs
            assert seen is not None
            exact = pair.exact.inputs if pair.exact.layer == name and self.rungs.drift else None
            moments, routed = (held_out if pair.held_out else train), Routed.of(seen)
            if routed is not None:
                for rows_seen, rows_exact in rows_of_same_tokens(seen, exact, routed, pair.mask.get((routed.tokens,))):
                    moments.add(rows_seen, rows_exact, None)
                continue
            mask = pair.mask.get(tuple(seen.shape[:-1]))
            if exact is not None and exact.shape != seen.shape:
                exact = None
            rows = [token_rows(seen, mask), None if exact is None else token_rows(exact, mask)]
            gap, loudness = self._gap(name, pair, seen, mask, weight)
            if not self.rungs.residual:
                gap = None
            if gap is not None and loudness is not None and self.rungs.loudness:
                rows, gap = [None if row is None else row / loudness for row in rows], gap / loudness
            assert rows[0] is not None
            moments.add(rows[0], rows[1], gap)
        self.shared = _Shared(self.unit_of[name], [weakref.ref(found) for found in inputs], train, held_out)
        return self.shared

    def _gap(
        self, name: str, pair: _Pair, seen: torch.Tensor, mask: torch.Tensor | None, weight: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of a layer that adds to a residual stream: float minus quantized stream ``[n, out]``, and the stream's rms.

        The rms ``[n, 1]`` is that of the float model after the addition. The stream is normalised, token by token,
        before anything reads it, so an error counts in proportion to it: the few tokens that carry huge activations
        would otherwise decide everything.
        """
        if pair.exact.layer != name:
            return None, None
        exact, quantized = pair.exact.residual, pair.quantized.residual
        expected = (*seen.shape[:-1], self.layers[name].shape[0])
        if exact is None or quantized is None or tuple(exact.shape) != expected or exact.shape != quantized.shape:
            return None, None
        assert pair.exact.inputs is not None
        output = linear(pair.exact.inputs, weight.to(exact.dtype), self._bias(name))
        self.outputs[id(pair.exact)] = output
        loudness = token_rows(exact + output, mask).square().mean(1, keepdim=True).sqrt()
        gap = token_rows(exact.to(torch.float32) - quantized.to(torch.float32), mask)
        return gap, loudness.clamp_(min=torch.finfo(torch.float32).tiny)

    def _quantize(self, name: str, shared: _Shared | None, weight: torch.Tensor | None = None) -> None:
        layer = self.layers[name]
        assert layer.scheme is not None
        if weight is None:
            weight = self.weights.weight(layer).to(self.device)
        tokens = shared.train.tokens + shared.held_out.tokens if shared is not None else 0
        if layer.method != CALIBRATED or shared is None or tokens < FEW_TOKENS:
            method = layer.method if layer.method != CALIBRATED else FALLBACK
            note = "" if layer.method != CALIBRATED else f"only {tokens} {FEW}: data-free"
            tensor = quantize_weight(weight, layer.scheme, method, scale_dtype=self.scale_dtype, name=name)
            self.tensors[name] = tensor
            self._count(LayerResult(name, method, tokens, note=note))
            return
        if not torch.isfinite(weight.sum()):
            quantize_weight(weight, layer.scheme, FALLBACK, name=name)  # raises what it raises everywhere
        moments = shared.train.plus(shared.held_out)
        group = layer.scheme.group(layer.shape[1])
        # what undoes the errors before the first of several uses of a layer would add to those before the others
        plain = name in self.repeated
        target = Target(weight, None, 0.0) if plain else correct(weight, shared.train, shared.held_out)
        if group not in shared.factors:
            damping = best_damping(
                target.weight, layer.scheme, shared.train.hessian, shared.held_out.hessian, name, self.scale_dtype
            )
            shared.factors[group] = factorize(moments.hessian, group, name, damping)
        factor = shared.factors[group]
        rounded = round_weight(target.weight, layer.scheme, factor, scale_dtype=self.scale_dtype)
        tensor, loss = rounded.tensor, rounded.loss
        if self.rungs.refit:
            damped = moments.hessian.clone()
            damped.diagonal().add_(factor.damping * moments.hessian.diagonal().mean())
            tensor, gained = refit_scales(tensor, target.weight, damped)
            loss -= gained
        size = float(((moments.hessian @ weight.t()) * weight.t()).sum())
        self.tensors[name] = tensor
        note = f"damped by {factor.damping:g}" if factor.damping > max(DAMPINGS) else ""
        error = max(0.0, loss) / size if size > 0 else 0.0
        self._count(LayerResult(name, CALIBRATED, tokens, error, target.gain, note))

    def _count(self, result: LayerResult, resumed: bool = False) -> None:
        self.done[result.name] = result
        seconds = time.perf_counter() - self.started
        self.progress(Progress(result, len(self.done), len(self.layers), seconds, resumed))

    def _leave_units(self, entering: str) -> None:
        """Hand over the tensors of a unit all of whose layers are done (a shared layer may keep one open)."""
        for unit in {self.unit_of[name] for name in self.tensors} - {entering}:
            members = [name for name in self.layers if self.unit_of[name] == unit]
            if all(name in self.done for name in members):
                self._flush(unit)

    def _flush(self, unit: str) -> None:
        members = [name for name in self.tensors if self.unit_of[name] == unit]
        self.record.add(unit, {name: self.tensors[name] for name in members}, [self.done[name] for name in members])
        for name in members:
            del self.tensors[name]

    # --- passes ------------------------------------------------------------------------------------------------------

    def _pair(self, index: int) -> _Pair:
        batch = self.data.batches[index]
        masks = {
            tuple(v.shape): v.to(self.device) for k, v in batch.items() if k.endswith("attention_mask") and v.ndim == 2
        }
        masks |= {(mask.numel(),): mask for mask in masks.values()}  # some models work on flattened tokens
        # of each kind of batch its share: what only images reach is not judged on text
        alike = [i for i, other in enumerate(self.data.batches) if other.keys() == batch.keys()]
        held_out = len(alike) > 1 and alike.index(index) % HELD_OUT == min(HELD_OUT, len(alike)) - 1
        return _Pair(self._stream(index), self._stream(index), masks, held_out)

    def _stream(self, index: int, learn: bool = False) -> Stream:
        batch = {name: value.to(self.device) for name, value in self.data.batches[index].items()}

        def run() -> None:
            self.model(**batch)

        return Stream(run, Trace(self.residuals, self.lost, learn))

    def _advance(self, stream: Stream, output: torch.Tensor | None) -> None:
        self.active = stream
        try:
            with explained(self.model, self.data.source):
                stream.advance(output)
        finally:
            self.active = None

    def _entering(self, block: Block) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
            if self.active is not None:
                self.active.enter(block.name, found)

        return enter

    def _scout(self) -> None:
        """Run the batch of most inputs through one block of each kind: which layers add to a residual stream?"""
        unseen = {block.kind for block in self.blocks}
        scout = self._stream(max(range(len(self.data.batches)), key=lambda i: len(self.data.batches[i])), learn=True)
        trace = scout._trace
        assert trace is not None
        self._advance(scout, None)
        kinds = {block.name: block.kind for block in self.blocks}
        first: dict[str, Block] = {}
        for block in self.blocks:
            first.setdefault(block.kind, block)
        met: set[str] = set()
        while scout.layer is not None and unseen:
            name = scout.layer
            (self.repeated if name in met else met).add(name)
            inputs = scout.inputs
            assert inputs is not None
            weight = self.weights.weight(self.layers[name]).to(self.device)
            self._advance(scout, linear(inputs, weight.to(inputs.dtype), self._bias(name)))
            left, now = self.unit_of[name], None if scout.layer is None else self.unit_of[scout.layer]
            if left != now and left in kinds:
                unseen.discard(kinds[left])
        self._find_repeated(scout, met)
        scout.close()
        for block in self.blocks:
            model_block = first[block.kind].name
            for name in block.layers:
                found = trace.found.get(model_block + name.removeprefix(block.name))
                if found is not None:
                    self.residuals[name] = found

    def _find_repeated(self, scout: Stream, met: set[str]) -> None:
        """Let the scout go on to the end, for the layers that it meets more than once; zeros do for that."""
        assert scout._trace is not None
        scout._trace.learn = False
        try:
            while scout.layer is not None:
                (self.repeated if scout.layer in met else met).add(scout.layer)
                assert scout.inputs is not None
                width = self.layers[scout.layer].shape[0]
                self._advance(scout, scout.inputs.new_zeros(*scout.inputs.shape[:-1], width))
        except CalibrationError as error:
            logger.debug("no layer is taken for repeated: %s", error)

    def _bias(self, name: str) -> torch.Tensor | None:
        return bias_of(self.model.get_submodule(name))
