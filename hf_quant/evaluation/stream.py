"""LogitStream: the logits of a causal language model, a few positions at a time, through the model's own head code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_quant.errors import EvaluationError
from hf_quant.nn.switching import switch

# One chunk of float32 logits; about six such buffers live at once while two models are compared.
CHUNK_BYTES = 32 * 2**20
_PROBE_TOKENS = 8


@dataclass
class Hidden:
    """What the backbone gave for one window: enough to compute the logits of any of its positions.

    Attributes:
        ids: int64 ``[1, length]``.
        output: the backbone's output with its hidden states ``[1, length, hidden]``; None when the backbone has to be
            run again for every chunk.
    """

    ids: torch.Tensor
    output: Any


class LogitStream:
    """Splits a model into backbone and head without knowing its architecture.

    The backbone runs once per window. The head runs per chunk: the model's own ``forward`` is called with the backbone
    replaced by a stub that returns the hidden states of that chunk, so that soft-capping, logit scaling and up-casts
    are the model's own. The constructor checks on a few tokens that this gives what the plain forward gives; if it does
    not, every chunk runs the whole model and only the head's input is sliced; if that does not either, it raises
    EvaluationError.

    Args:
        model: a causal language model (anything whose forward takes ``input_ids`` and returns ``.logits``).
        name: how errors name it.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name
        self.device = next(model.parameters()).device
        self._backbone: nn.Module | None = None
        self._head: nn.Module | None = None
        with torch.no_grad():
            self._probe()

    @property
    def reruns_backbone(self) -> bool:
        """Every chunk runs the whole model (slower, same result)."""
        return self._backbone is None

    @property
    def chunk(self) -> int:
        """How many positions fit into CHUNK_BYTES of float32 logits."""
        return max(1, CHUNK_BYTES // (4 * self.vocabulary))

    @torch.no_grad()
    def hidden(self, ids: torch.Tensor) -> Hidden:
        """Run the backbone on one window ``[1, length]`` (any device)."""
        ids = ids.to(self.device)
        if self._backbone is None:
            return Hidden(ids, None)
        captured: list[Any] = []

        def keep_last(module: nn.Module, args: Any, output: Any) -> Any:
            captured.append(output)
            return _slice(output, ids.shape[1] - 1, ids.shape[1])

        handle = self._backbone.register_forward_hook(keep_last)
        try:
            self._forward(ids)
        finally:
            handle.remove()
        return Hidden(ids, _slice(captured[0], 0, ids.shape[1]))

    @torch.no_grad()
    def logits(self, hidden: Hidden, start: int, stop: int) -> torch.Tensor:
        """Logits at positions ``start .. stop - 1`` of the window, float32 ``[stop - start, vocabulary]``."""
        if self._backbone is not None:
            with _stubbed(self._backbone, _slice(hidden.output, start, stop)):
                logits = self._forward(hidden.ids[:, start:stop])
        else:
            assert self._head is not None

            def keep_chunk(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                return (args[0][:, start:stop], *args[1:])

            handle = self._head.register_forward_pre_hook(keep_chunk)
            try:
                logits = self._forward(hidden.ids)
            finally:
                handle.remove()
        return logits[0].to(torch.float32)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits

    def _probe(self) -> None:
        """Find the backbone and make sure that streaming changes nothing.

        Both sides run unfused: hooks see to that on one of them, and with int8 activations a last bit that differs can
        move a code.
        """
        with switch(False):
            self._find()

    def _find(self) -> None:
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        rows = int(getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0])
        ids = (torch.arange(_PROBE_TOKENS, device=self.device) * 7919 % max(rows - 1, 1)).unsqueeze(0)
        backbone, expected = self._trace(ids)
        self.vocabulary = int(expected.shape[-1])
        if backbone is not None:
            self._backbone = backbone
            if self._agrees(ids, expected):
                return
            self._backbone = None
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Module):
            self._head = head
            if self._agrees(ids, expected):
                return
        raise EvaluationError(
            f"the logits of {self.name} ({type(self.model).__name__}) cannot be streamed: its output head does not "
            "work position by position.",
            "evaluate a causal language model of transformers (AutoModelForCausalLM).",
        )

    def _trace(self, ids: torch.Tensor) -> tuple[nn.Module | None, torch.Tensor]:
        """The first submodule that forward calls directly and that returns one vector per token, and the logits."""
        calls: list[nn.Module] = []
        found: list[nn.Module] = []

        def enter(module: nn.Module, args: Any) -> None:
            calls.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            calls.pop()
            states = None if calls or isinstance(output, torch.Tensor) else states_in(output)
            if states is not None and states.ndim == 3 and states.shape[:2] == ids.shape:
                found.append(module)

        handles = []
        for module in self.model.modules():
            if module is not self.model:
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            logits = self._forward(ids)[0].to(torch.float32)
        finally:
            for handle in handles:
                handle.remove()
        return (found[0] if len(found) == 1 else None), logits

    def _agrees(self, ids: torch.Tensor, expected: torch.Tensor) -> bool:
        """Chunks of unequal size give the plain forward's logits, up to the order of the head's sums."""
        try:
            hidden = self.hidden(ids)
            parts = [self.logits(hidden, 0, 3), self.logits(hidden, 3, 4), self.logits(hidden, 4, _PROBE_TOKENS)]
        except (TypeError, IndexError, RuntimeError, AttributeError, ValueError, KeyError):
            return False  # this way of streaming does not fit the model; the caller tries the next one or raises
        actual = torch.cat(parts)
        if actual.shape != expected.shape:
            return False
        narrow = self.model.dtype in (torch.bfloat16, torch.float16)
        return bool(torch.allclose(actual, expected, rtol=2e-2 if narrow else 1e-4, atol=2e-2 if narrow else 1e-4))


def chunks(length: int, size: int) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` pairs that cover ``0 .. length``."""
    for start in range(0, length, size):
        yield start, min(start + size, length)


def states_in(output: Any) -> torch.Tensor | None:
    """The hidden states in a module's output (a tensor, a ModelOutput or a tuple); None where there are none."""
    if isinstance(output, torch.Tensor):
        return output
    try:
        first = output[0]
    except (TypeError, KeyError, IndexError):
        return None
    return first if isinstance(first, torch.Tensor) else None


def _slice(output: Any, start: int, stop: int) -> Any:
    """A backbone's output with the hidden states of some positions and nothing else of size (no caches)."""
    if isinstance(output, tuple):
        return (output[0][:, start:stop], *(None for _ in output[1:]))
    return type(output)(last_hidden_state=output.last_hidden_state[:, start:stop])


@contextmanager
def _stubbed(module: nn.Module, output: Any) -> Iterator[None]:
    """For the time being, calling ``module`` returns ``output``."""
    had = module.__dict__.get("forward")  # accelerate's hooks live here
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if had is None:
            del module.forward
        else:
            module.forward = had
