"""A model's forward pass that stops at every layer to be quantized: one coroutine per batch, whatever the architecture.

The model's own code runs, unchanged, inside a greenlet. The forward of each watched layer hands its input to the caller
and waits; the caller answers with the layer's output, and the pass goes on to the next watched layer. Many batches can
so stand at the same layer at the same time, without any knowledge of how the model is wired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_quant.errors import CalibrationError
from hf_quant.nn.forwards import replaced_forwards

_ADDS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
_SAME = {"dropout", "contiguous", "to"}  # functions that may return their argument itself, or a copy of it
BLOCK_INPUT = -1


@dataclass(frozen=True)
class Residual:
    """Where the stream that a layer's output is added to comes from, within its block.

    Attributes:
        source: the torch call of the block whose result it is, or BLOCK_INPUT.
        addition: the torch call that adds the two.
        path: of the torch calls of the block before the layer; where another block of its class takes another path,
            the numbers above mean something else.
    """

    source: int
    addition: int
    path: int


@dataclass(frozen=True)
class BlockCall:
    """A block that waits for its output: what it was called with, and its own forward."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stream:
    """One batch on its way through the model.

    Attributes:
        layer: name of the layer (or block) that waits for its output; None before the start and after the end.
        inputs: that layer's input.
        call: of a block: how it was called.
    """

    def __init__(self, run: Callable[[], None], trace: Trace | None = None) -> None:
        self._greenlet = greenlet(lambda _=None: run())
        self._trace = trace
        self.layer: str | None = None
        self.inputs: torch.Tensor | None = None
        self.call: BlockCall | None = None

    def advance(self, output: Any = None) -> None:
        """Give the waiting layer its output (None at the start) and run until the next watched layer or the end."""
        if self._trace is not None:
            self._trace.answered(self.layer, output)
            with self._trace:
                stop = self._greenlet.switch(output)
        else:
            stop = self._greenlet.switch(output)
        name, payload = (None, None) if self._greenlet.dead else stop
        self.layer = name
        self.inputs, self.call = (None, payload) if isinstance(payload, BlockCall) else (payload, None)

    def close(self) -> None:
        """Give up: the model's code is left by an exception."""
        if self._greenlet and not self._greenlet.dead:
            self._greenlet.throw(GreenletExit)
        self.layer = self.inputs = self.call = None

    @property
    def residual(self) -> torch.Tensor | None:
        """The residual stream that the waiting layer's output will be added to, where that is known."""
        return None if self._trace is None or self.layer is None else self._trace.residual(self.layer)

    def enter(self, block: str, inputs: torch.Tensor | None) -> None:
        """The pass enters a block of the model."""
        if self._trace is not None:
            self._trace.enter(block, inputs)


@contextmanager
def explained(model: nn.Module, source: str) -> Iterator[None]:
    """What a model's code raises inside becomes a CalibrationError about the data from ``source``."""
    try:
        yield
    except (AttributeError, TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
        raise CalibrationError(
            f"{type(model).__name__} does not run on the calibration data ({source}): {error}",
            "give data that fits this model (text, images: or audio:), or a smaller length.",
        ) from error


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Inside, no part of a model keeps keys and values: a block that is called again would find those of before."""
    configs = {id(found): found for module in model.modules() if (found := getattr(module, "config", None)) is not None}
    before = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, value in before:
            config.use_cache = value


@contextmanager
def watched(model: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    """Inside, the named modules hand their input to whoever advances the stream that runs them."""

    def pausing(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            caller = getcurrent().parent
            assert caller is not None  # only streams run a watched model
            output: torch.Tensor = caller.switch((name, inputs))
            return output

        return forward

    with replaced_forwards((model.get_submodule(name), pausing(name)) for name in layers):
        yield


@contextmanager
def pausing_blocks(model: nn.Module, blocks: Iterable[str]) -> Iterator[None]:
    """Inside, the named blocks hand how they were called to whoever advances the stream that runs them."""

    def pausing(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            caller = getcurrent().parent
            assert caller is not None  # only streams run a watched model
            return caller.switch((name, BlockCall(own, args, kwargs)))

        return forward

    modules = [(name, model.get_submodule(name)) for name in blocks]
    with replaced_forwards([(module, pausing(name, module.forward)) for name, module in modules]):
        yield


class Trace(TorchFunctionMode):
    """Numbers the torch calls of a block, and keeps the results that a :class:`Residual` refers to.

    Args:
        residuals: layer -> where its residual stream is, for the layers where that is known.
        lost: layers whose residual turned out to be another one at run time are added here.
        learn: note where every layer's output is added, in ``found`` (keeps all results of a block alive).
    """

    def __init__(self, residuals: dict[str, Residual], lost: set[str], learn: bool = False) -> None:
        super().__init__()
        self.residuals, self.lost, self.learn = residuals, lost, learn
        self.found: dict[str, Residual] = {}
        self._calls = self._path = 0
        self._inside = False
        self._kept: dict[int, torch.Tensor] = {}
        self._wanted: set[int] = set()
        self._checks: dict[int, tuple[str, int]] = {}
        self._results: dict[
            int, tuple[int, torch.Tensor]
        ] = {}  # id -> (call, the tensor, so that the id stays its own)
        self._outputs: dict[int, tuple[str, torch.Tensor]] = {}
        self._paths: dict[str, int] = {}

    def enter(self, block: str, inputs: torch.Tensor | None) -> None:
        """A block begins."""
        self._calls, self._path, self._inside = 0, 0, inputs is not None
        self._kept.clear()
        self._results.clear()
        self._outputs.clear()
        mine = {name: r for name, r in self.residuals.items() if name.startswith(block + ".")}
        self._wanted = {r.source for r in mine.values()}
        self._checks = {r.addition: (name, r.source) for name, r in mine.items()}
        if inputs is not None:
            self._kept[BLOCK_INPUT] = inputs
            self._results[id(inputs)] = (BLOCK_INPUT, inputs)

    def answered(self, layer: str | None, output: torch.Tensor | None) -> None:
        """A watched layer got its output."""
        if self.learn and layer is not None and output is not None:
            self._outputs[id(output)] = (layer, output)
            self._paths[layer] = self._path

    def residual(self, layer: str) -> torch.Tensor | None:
        """The stream that the output of a layer, which waits for it, will be added to; None where that is not known."""
        found = self.residuals.get(layer)
        if found is not None and found.path != self._path:
            self.lost.add(layer)
        return None if found is None or layer in self.lost else self._kept.get(found.source)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            return result
        call = self._calls
        self._calls += 1
        self._path = hash((self._path, getattr(func, "__name__", "")))
        if call in self._checks:
            layer, source = self._checks[call]
            if not any(argument is self._kept.get(source) for argument in args):
                self.lost.add(layer)
        if call in self._wanted and isinstance(result, torch.Tensor):
            self._kept[call] = result
        if self.learn:
            self._learn(func, args, result, call)
        return result

    def _learn(self, func: Any, args: Any, result: Any, call: int) -> None:
        name = getattr(func, "__name__", "")
        if name in _ADDS and len(args) == 2 and all(isinstance(argument, torch.Tensor) for argument in args):
            for one, other in (args, args[::-1]):
                layer, stream = self._outputs.get(id(one)), self._results.get(id(other))
                if layer is not None and stream is not None and one.shape == other.shape:
                    self.found[layer[0]] = Residual(stream[0], call, self._paths[layer[0]])
        if not isinstance(result, torch.Tensor):
            return
        if name in _SAME and args and id(args[0]) in self._outputs:
            self._outputs[id(result)] = (self._outputs[id(args[0])][0], result)
        self._results[id(result)] = (call, result)
