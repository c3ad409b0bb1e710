"""What tuning minimises: KL of the output head's distributions, or the squared error of the last hidden states."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import linear

from hf_quant.errors import CalibrationError
from hf_quant.nn.forwards import replaced_forwards

CHUNK_BYTES = 32 * 2**20  # of float32 logits


class Objective(Protocol):
    """The distance of the model as it is now from recorded answers of the float model."""

    def answer(self, sample: dict[str, torch.Tensor]) -> torch.Tensor:
        """What :meth:`loss` needs to know of the float model: ``[tokens, hidden]``."""

    def loss(self, sample: dict[str, torch.Tensor], answer: torch.Tensor) -> float:
        """Mean per token, without gradients."""

    def backward(self, sample: dict[str, torch.Tensor], answer: torch.Tensor, weight: float) -> float:
        """As :meth:`loss`, and adds ``weight`` times its gradient to the parameters."""


def find_objective(model: nn.Module, quantized: Container[str], sample: dict[str, torch.Tensor]) -> Objective:
    """KL for a model whose logits are its output head applied to hidden states; else squared error.

    Args:
        model: it can run: its layers have weights.
        quantized: names of the layers whose output will change; KL needs a head that does not.
        sample: on which it is seen whether the model does something else to its logits (caps or scales them).
    """
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Module):
        return _Distance(model, None)
    name = next((name for name, module in model.named_modules() if module is head), "")
    if isinstance(head, nn.Linear) and name not in quantized and _is_last(model, head, sample):
        return _Divergence(model, head)
    return _Distance(model, head)


@torch.no_grad()
def _is_last(model: nn.Module, head: nn.Linear, sample: dict[str, torch.Tensor]) -> bool:
    """Whether the model's logits are what its output head gives."""
    found: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        logits = getattr(model(**sample, **_no_cache(model)), "logits", None)
    finally:
        hook.remove()
    if not found or not isinstance(logits, torch.Tensor) or logits.shape != found[-1].shape:
        return False
    return torch.allclose(logits[:, :4], found[-1][:, :4].to(logits.dtype), rtol=1e-3, atol=1e-5)


def _head_input(model: nn.Module, head: nn.Module, sample: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The hidden states ``[tokens, hidden]`` that the head is given, without padding; the head itself is not run."""
    found: list[torch.Tensor] = []

    def capture(hidden: torch.Tensor) -> torch.Tensor:
        found.append(hidden)
        return hidden[..., :1]

    with replaced_forwards([(head, capture)]):
        model(**sample, **_no_cache(model))
    return _tokens(found[-1], sample) if found else None


def _tokens(hidden: torch.Tensor, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """``[batch, length, hidden]`` -> ``[tokens, hidden]`` without padding."""
    mask = sample.get("decoder_attention_mask" if "decoder_input_ids" in sample else "attention_mask")
    if mask is not None and mask.shape == hidden.shape[:-1]:
        return hidden[mask.bool()]
    return hidden.reshape(-1, hidden.shape[-1])


class _Divergence:
    """KL(float || quantized) in nats per token, over the whole vocabulary, a chunk of positions at a time."""

    def __init__(self, model: nn.Module, head: nn.Linear) -> None:
        self.model, self.head = model, head
        self.chunk = max(1, CHUNK_BYTES // (4 * head.out_features))

    def answer(self, sample: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._hidden(sample)

    @torch.no_grad()
    def loss(self, sample: dict[str, torch.Tensor], answer: torch.Tensor) -> float:
        return self._compare(self._hidden(sample), answer, None)

    def backward(self, sample: dict[str, torch.Tensor], answer: torch.Tensor, weight: float) -> float:
        with torch.enable_grad():
            hidden = self._hidden(sample)
        slope = torch.empty_like(hidden)
        loss = self._compare(hidden.detach(), answer, slope)
        hidden.backward(slope.mul_(weight))
        return loss

    def _hidden(self, sample: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = _head_input(self.model, self.head, sample)
        assert hidden is not None  # find_objective has seen it
        return hidden

    def _compare(self, hidden: torch.Tensor, answer: torch.Tensor, slope: torch.Tensor | None) -> float:
        weight = self.head.weight.detach()
        bias = None if self.head.bias is None else self.head.bias.detach()
        total = 0.0
        for start in range(0, len(hidden), self.chunk):
            piece = slice(start, start + self.chunk)
            wanted = torch.log_softmax(linear(answer[piece], weight, bias), -1)
            found = torch.log_softmax(linear(hidden[piece], weight, bias), -1)
            share = wanted.exp()
            total += float(wanted.sub_(found).mul_(share).sum())
            if slope is not None:
                slope[piece] = found.exp_().sub_(share) @ weight / len(hidden)
        return total / len(hidden)


class _Distance:
    """|quantized - float|^2 / |float|^2 of the last hidden states: what the head reads, or what the model gives."""

    def __init__(self, model: nn.Module, head: nn.Module | None) -> None:
        self.model, self.head = model, head

    def answer(self, sample: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._output(sample)

    @torch.no_grad()
    def loss(self, sample: dict[str, torch.Tensor], answer: torch.Tensor) -> float:
        return float((self._output(sample) - answer).square().sum() / answer.square().sum())

    def backward(self, sample: dict[str, torch.Tensor], answer: torch.Tensor, weight: float) -> float:
        with torch.enable_grad():
            loss = (self._output(sample) - answer).square().sum() / answer.square().sum()
        (loss * weight).backward()
        return float(loss.detach())

    def _output(self, sample: dict[str, torch.Tensor]) -> torch.Tensor:
        # not the logits: those of all samples of a large vocabulary would not fit into memory
        hidden = None if self.head is None else _head_input(self.model, self.head, sample)
        if hidden is not None:
            return hidden
        result = self.model(**sample, **_no_cache(self.model))
        for name in ("last_hidden_state", "logits"):
            found = getattr(result, name, None)
            if isinstance(found, torch.Tensor):
                return _tokens(found, sample)
        raise CalibrationError(
            f"{type(self.model).__name__} gives neither logits nor hidden states.",
            "use preset=balanced for this model.",
        )


def _no_cache(model: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}
