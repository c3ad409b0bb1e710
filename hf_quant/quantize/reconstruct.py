"""Block reconstruction: the scales of a block trained together until its output is the float model's.

The walk chooses the scales of one layer after another and never comes back to one. Here all scales of a block, with the
quantized model's stream as its input, are trained (Adam) towards the float model's output of that block, as the block
phases of OmniQuant (arXiv:2308.13137) and BRECQ (arXiv:2102.05426) do. Codes stay: moving them by the sign of their
gradient (AutoRound, arXiv:2309.05516) undoes what the walk's error compensation arranged, and on its result only made
blocks worse. Held-out samples decide whether a block keeps what it learned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from hf_quant.calibration.data import CalibrationData
from hf_quant.nn.forwards import multiplying
from hf_quant.plan import Plan
from hf_quant.quantize.blocks import Block, find_blocks
from hf_quant.quantize.contracts import Weights
from hf_quant.quantize.distill import ScaledLayer, multiplies_bfloat16
from hf_quant.quantize.streams import BlockCall, Stream, explained, pausing_blocks, uncached
from hf_quant.tensor import QuantizedTensor

HELD_OUT = 8  # one batch of so many decides, and is not trained on
CHECKS = 4  # looks at the held-out batches
RATE = 1e-3  # learning rate of the scales, as a share of each
_TINY = 1e-12
Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Reconstruction:
    """What became of one block.

    Attributes:
        block: its name.
        before: squared error of its output on held-out samples, as a share of the output.
        after: the same with what is kept.
        done: blocks so far, of ``total``.
        total: blocks.
        seconds: since the start.
    """

    block: str
    before: float
    after: float
    done: int
    total: int
    seconds: float


@dataclass
class _Pair:
    """The passes of one batch, float and quantized."""

    exact: Stream
    quantized: Stream
    mask: dict[tuple[int, ...], torch.Tensor]


def reconstruct(
    model: nn.Module,
    plan: Plan,
    data: CalibrationData,
    weights: Weights,
    tensor: Callable[[str], QuantizedTensor],
    keep: Callable[[str, Mapping[str, QuantizedTensor]], None],
    finished: Callable[[str], bool],
    steps: int,
    *,
    progress: Callable[[Reconstruction], None] | None = None,
) -> None:
    """Train the blocks of a quantized model one after the other.

    Args:
        model: float32, in eval mode; the planned layers may be placeholders that have a ``bias`` and nothing else.
        plan: made for this model.
        data: batches of keyword arguments of the model's forward; one of eight is held out.
        weights: the float weights of the planned layers.
        tensor: the quantized weight of a layer as it is now.
        keep: called with every block's name and the tensors that changed (none when training did not help).
        finished: whether a block was done by an earlier run, whose result ``tensor`` then gives.
        steps: optimizer steps per block, each on one batch.
        progress: called after every block.
    """
    _Reconstructor(model, plan, data, weights, tensor, keep, finished, steps, progress or (lambda step: None)).run()


class _Reconstructor:
    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        data: CalibrationData,
        weights: Weights,
        tensor: Callable[[str], QuantizedTensor],
        keep: Callable[[str, Mapping[str, QuantizedTensor]], None],
        finished: Callable[[str], bool],
        steps: int,
        progress: Callable[[Reconstruction], None],
    ) -> None:
        self.model, self.weights, self.tensor, self.source = model, weights, tensor, data.source
        self.batches = list(data.batches)
        if len(self.batches) == 1 and data.samples > 1:  # or nothing could be held out
            self.batches = [part.batches[0] for part in data.split(max(1, data.samples // HELD_OUT))]
        self.keep, self.finished, self.steps, self.progress = keep, finished, steps, progress
        self.layers = {layer.name: layer for layer in plan.quantized}
        self.blocks = find_blocks(model, list(self.layers))
        self.device = next(model.parameters()).device
        self.narrow = torch.bfloat16 if multiplies_bfloat16(self.device) else torch.float32  # of training, not judging
        self.exact = False  # the pass that is running is the float model's
        self.started = time.perf_counter()

    def run(self) -> None:
        inside = {name for block in self.blocks for name in block.layers}
        outside = {name for name in self.layers if name not in inside}
        pairs: list[_Pair] = []
        try:
            with (
                torch.no_grad(),
                uncached(self.model),
                multiplying(self.model, {name: self._either(name) for name in outside}),
                pausing_blocks(self.model, [block.name for block in self.blocks]),
            ):
                pairs = [self._pair(batch) for batch in self.batches]
                for pair in pairs:
                    self._advance(pair, None, None)
                done: set[str] = set()
                while waiting := {pair.quantized.layer for pair in pairs if pair.quantized.layer}:
                    name = next(block.name for block in self.blocks if block.name in waiting)
                    here = [pair for pair in pairs if pair.quantized.layer == name]
                    self._visit(next(b for b in self.blocks if b.name == name), here, name in done)
                    done.add(name)
                    if len(done) == len(self.blocks):
                        break  # nothing that comes after is trained
        finally:
            for pair in pairs:
                pair.exact.close()
                pair.quantized.close()

    def _visit(self, block: Block, pairs: Sequence[_Pair], again: bool) -> None:
        """All passes that wait at a block: train it, and send them on."""
        floats = {name: self.weights.weight(self.layers[name]).to(self.device) for name in block.layers}
        with multiplying(self.model, _products(floats)):
            exact = [self._call(pair.exact) for pair in pairs]
        wanted = [_output(found) for found in exact]
        if not again and not self.finished(block.name) and all(isinstance(found, torch.Tensor) for found in wanted):
            changed, report = self._train(block, pairs, wanted)
            self.keep(block.name, changed)
            self.progress(report)
        rounded = _products({name: self.tensor(name).to(self.device).dequantize() for name in block.layers})
        for pair, answer in zip(pairs, exact, strict=True):
            with multiplying(self.model, rounded):
                quantized = self._call(pair.quantized)
            self._advance(pair, answer, quantized)

    def _train(
        self, block: Block, pairs: Sequence[_Pair], wanted: Sequence[Any]
    ) -> tuple[dict[str, QuantizedTensor], Reconstruction]:
        layers = {name: ScaledLayer(self.tensor(name), self.device) for name in block.layers}
        held_out = max(1, len(pairs) // HELD_OUT) if len(pairs) > 1 else 0
        train, judge = list(range(len(pairs) - held_out)), list(range(len(pairs) - held_out, len(pairs)))
        judge = judge or train
        trained = {name: layer for name, layer in layers.items() if layer.tensor.nested is None}

        def loss(index: int, forwards: Mapping[str, Product]) -> torch.Tensor:
            pair, target = pairs[index], wanted[index]
            with multiplying(self.model, forwards):
                found = _output(self._call(pair.quantized))
            rows = (found - target).square().mean(-1) / target.square().mean(-1).clamp(min=_TINY)
            mask = pair.mask.get(tuple(rows.shape))
            return rows.mean() if mask is None else (rows * mask).sum() / mask.sum()

        def judged() -> float:
            stored = _products({name: layer.stored().dequantize() for name, layer in trained.items()})
            return sum(float(loss(index, {**fixed, **stored})) for index in judge) / len(judge)

        fixed = _products({name: layers[name].tensor.dequantize() for name in layers.keys() - trained.keys()})
        training = {name: layer.forward for name, layer in layers.items()}
        for layer in layers.values():
            layer.compute = self.narrow
        before = best = judged()
        kept: dict[str, QuantizedTensor] = {}
        factors = [layer.factor for layer in trained.values()]
        optimizer = torch.optim.Adam(factors, lr=RATE) if factors else None
        look = max(1, self.steps // CHECKS)
        for step in range(self.steps if optimizer else 0):
            assert optimizer is not None
            with torch.enable_grad():
                value = loss(train[step % len(train)], training)
            if not value.requires_grad:
                break  # no layer of this block was used
            # and not for the norms and biases, which may want gradients, too
            value.backward(inputs=factors)
            for settings in optimizer.param_groups:
                settings["lr"] = RATE * (1 - step / self.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % look == 0 or step + 1 == self.steps:
                now = judged()
                if now < best:
                    best, kept = now, {name: layer.stored() for name, layer in trained.items()}
        seconds = time.perf_counter() - self.started
        return kept, Reconstruction(block.name, before, best, self.blocks.index(block) + 1, len(self.blocks), seconds)

    # --- passes ------------------------------------------------------------------------------------------------------

    def _pair(self, batch: Mapping[str, torch.Tensor]) -> _Pair:
        moved = {name: value.to(self.device) for name, value in batch.items()}
        masks = {tuple(v.shape): v for k, v in moved.items() if k.endswith("attention_mask") and v.ndim == 2}
        return _Pair(Stream(lambda: self.model(**moved)), Stream(lambda: self.model(**moved)), masks)

    def _advance(self, pair: _Pair, exact: Any, quantized: Any) -> None:
        with explained(self.model, self.source):
            self.exact = True
            pair.exact.advance(exact)
            self.exact = False
            pair.quantized.advance(quantized)

    @staticmethod
    def _call(stream: Stream) -> Any:
        call = stream.call
        assert isinstance(call, BlockCall)
        return call.forward(*call.args, **call.kwargs)

    def _either(self, name: str) -> Product:
        """A layer outside of all blocks: the float weight in the float model's passes, else the quantized one."""

        def product(x: torch.Tensor) -> torch.Tensor:
            weight = self.weights.weight(self.layers[name]) if self.exact else self.tensor(name).dequantize()
            return linear(x, weight.to(self.device, x.dtype))

        return product


def _products(weights: Mapping[str, torch.Tensor]) -> dict[str, Product]:
    return {name: partial(_multiply, weight) for name, weight in weights.items()}


def _multiply(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return linear(x, weight.to(x.device, x.dtype))


def _output(found: Any) -> Any:
    return found[0] if isinstance(found, (tuple, list)) else found
