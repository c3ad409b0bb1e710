"""What tuning minimises: KL of the output head's distributions, or the squared error of the last hidden states."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import linear

from hf_quant.errors import CalibrationError

CHUNK_BYTES = 32 * 2**20  # of float32 logits


class Objective(Protocol):
    """The distance of the model as it is now from recorded answers of the float model."""

    def answer(self, sample: dict[str, torch.Tensor]) -> torch.Tensor:
        """What :meth:`loss` needs to know of the float model: ``[tokens, hidden]``."""

    def loss(self, sample: dict[str, torch.Tensor], answer: torch.Tensor) -> float:
        """Mean per token, without gradients."""

    def backward(self, sample: dict[str, torch.Tensor], answer: torch.Tensor, weight: float) -> float:
        """As :meth:`loss`, and adds ``weight`` times its gradient to the parameters."""


def find_objective(model: nn.Module) -> Objective:
    """KL for a model whose logits are its output head applied to hidden states; else squared error."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if isinstance(head, nn.Linear) and not getattr(model.config, "final_logit_softcapping", None):
        return _Divergence(model, head)
    return _Distance(model)


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
        """The head's input ``[tokens, hidden]``; the head itself is not run."""
        found: list[torch.Tensor] = []

        def capture(hidden: torch.Tensor) -> torch.Tensor:
            found.append(hidden)
            return hidden[..., :1]

        self.head.forward = capture  # type: ignore[method-assign, assignment]
        try:
            self.model(**sample, **_no_cache(self.model))
        finally:
            del self.head.forward
        if not found:
            raise CalibrationError(
                f"{type(self.model).__name__} did not use its output head.", "use preset=balanced for this model."
            )
        mask = sample.get("attention_mask")
        hidden = found[-1]
        if mask is not None and mask.shape == hidden.shape[:-1]:
            return hidden[mask.bool()]
        return hidden.reshape(-1, hidden.shape[-1])

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
    """|quantized - float|^2 / |float|^2 of the model's output."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def answer(self, sample: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._output(sample)

    @torch.no_grad()
    def loss(self, sample: dict[str, torch.Tensor], answer: torch.Tensor) -> float:
        return float((self._output(sample) - answer).square().sum() / answer.square().sum())

    def backward(self, sample: dict[str, torch.Tensor], answer: torch.Tensor, weight: float) -> float:
        with torch.enable_grad():
            loss = (self._output(sample) - answer).square().sum() / answer.square().sum()
        (loss * weight).backward()
        return float(loss)

    def _output(self, sample: dict[str, torch.Tensor]) -> torch.Tensor:
        result = self.model(**sample, **_no_cache(self.model))
        for name in ("last_hidden_state", "logits"):
            found = getattr(result, name, None)
            if isinstance(found, torch.Tensor):
                mask = sample.get("attention_mask")
                if mask is not None and mask.shape == found.shape[:2]:
                    return found[mask.bool()]
                return found.reshape(-1, found.shape[-1])
        raise CalibrationError(
            f"{type(self.model).__name__} gives neither logits nor hidden states.",
            "use preset=balanced for this model.",
        )


def _no_cache(model: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}
