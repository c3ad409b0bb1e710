"""KL divergence, perplexity and top-1 agreement of a model against a reference, streamed in chunks of positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_quant.errors import EvaluationError
from hf_quant.evaluation.bootstrap import Bootstrap, increase_percent, perplexity
from hf_quant.evaluation.results import Interval
from hf_quant.evaluation.stream import Hidden, LogitStream, chunks

Array = NDArray[np.float64]
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Reference:
    """The float model on the windows of one text: its backbone has run, its logits are computed when they are needed.

    Attributes:
        stream: the float model.
        ids: int64 ``[windows, length]``.
        hidden: one entry per window: ``length * hidden_size`` numbers each, whatever the vocabulary.
    """

    stream: LogitStream
    ids: torch.Tensor
    hidden: tuple[Hidden, ...]


@dataclass(frozen=True)
class Divergence:
    """A model against a reference on one text, in nats per token; the first token of a window is not scored.

    Attributes:
        kl: float64 ``[windows, length - 1]``, KL(reference || model) at every scored position.
        nll_reference: float64 ``[windows, length - 1]``, the reference's negative log-likelihoods.
        nll_model: the model's.
        agree: bool ``[windows, length - 1]``, both models' most likely token is the same.
        confidence: the probability of the reference's most likely token.
        kl_variance: of the estimate of ``kl``; None where it was computed from all logits.
    """

    kl: Array
    nll_reference: Array
    nll_model: Array
    agree: NDArray[np.bool_]
    confidence: Array
    kl_variance: Array | None = None

    @property
    def kl_p99(self) -> float:
        """99th percentile of the divergence over all scored positions."""
        return float(np.quantile(self.kl, 0.99))

    @property
    def kl_error(self) -> float | None:
        """Half of the 95 % interval of what the estimate adds to the mean divergence; None without an estimate."""
        if self.kl_variance is None:
            return None
        return float(NORMAL_95 * np.sqrt(self.kl_variance.sum()) / self.kl_variance.size)

    def summary(self, bootstrap: Bootstrap) -> Summary:
        """Means over windows with their 95 % intervals."""
        reference, model = self.nll_reference.mean(axis=1), self.nll_model.mean(axis=1)
        return Summary(
            kl=bootstrap.interval(self.kl.mean(axis=1)),
            top1_agreement=bootstrap.interval(self.agree.mean(axis=1)),
            perplexity_reference=bootstrap.interval(reference, statistic=perplexity),
            perplexity_model=bootstrap.interval(model, statistic=perplexity),
            perplexity_increase_percent=bootstrap.interval(reference, model, statistic=increase_percent),
        )


@dataclass(frozen=True)
class Summary:
    """The figures of a :class:`Divergence`; agreement is a share (0 to 1)."""

    kl: Interval
    top1_agreement: Interval
    perplexity_reference: Interval
    perplexity_model: Interval
    perplexity_increase_percent: Interval


def run_reference(stream: LogitStream, ids: torch.Tensor, advance: Callable[[], None] | None = None) -> Reference:
    """Run the float model's backbone over windows ``[windows, length]``; ``advance`` is called after each window."""
    hidden: list[Hidden] = []
    for row in ids:
        hidden.append(stream.hidden(row.unsqueeze(0)))
        if advance is not None:
            advance()
    return Reference(stream, ids, tuple(hidden))


@torch.no_grad()
def compare(reference: Reference, stream: LogitStream, advance: Callable[[], None] | None = None) -> Divergence:
    """Compare a model with the reference, window by window, in chunks of positions.

    Memory besides the two models: about six chunks of float32 logits (``stream.CHUNK_BYTES`` each), whatever the
    vocabulary and the window. ``advance`` is called after each window. Raises EvaluationError when the vocabularies
    differ or a logit is not a number.
    """
    check_vocabulary(stream.name, stream.vocabulary, reference.stream.name, reference.stream.vocabulary)
    windows, length = reference.ids.shape
    scored = length - 1
    shape = (windows, scored)
    kls, references, models, sure = (np.empty(shape) for _ in range(4))
    result = Divergence(kls, references, models, np.empty(shape, dtype=np.bool_), sure)
    size = min(stream.chunk, reference.stream.chunk)
    for window, row in enumerate(reference.ids):
        other = stream.hidden(row.unsqueeze(0))
        for start, stop in chunks(scored, size):
            actual = stream.logits(other, start, stop)
            expected = reference.stream.logits(reference.hidden[window], start, stop).to(actual.device)
            targets = row[start + 1 : stop + 1].to(actual.device)
            kl, nll_reference, nll_model, agree, confidence = _scores(expected, actual, targets)
            result.kl[window, start:stop] = kl.cpu().numpy()
            result.nll_reference[window, start:stop] = nll_reference.cpu().numpy()
            result.nll_model[window, start:stop] = nll_model.cpu().numpy()
            result.agree[window, start:stop] = agree.cpu().numpy()
            result.confidence[window, start:stop] = confidence.cpu().numpy()
        for name, values in ((reference.stream.name, result.nll_reference), (stream.name, result.nll_model)):
            check_finite(name, values[window], window)
        if advance is not None:
            advance()
    return result


def check_vocabulary(name: str, size: int, reference: str, reference_size: int) -> None:
    """Raises EvaluationError where two models do not have the same number of logits per token."""
    if size != reference_size:
        raise EvaluationError(
            f"{name} has {size} logits per token, {reference} has {reference_size}.",
            "compare a model with the float model that it was made from.",
        )


def check_finite(name: str, losses: NDArray[Any], window: int) -> None:
    """Raises EvaluationError where a loss of a window is not a number."""
    if not np.isfinite(losses).all():
        raise EvaluationError(
            f"{name} gives a loss that is not finite in window {window}.",
            "its weights, or this dtype's range, are broken; try --dtype float32.",
        )


def _scores(
    expected: torch.Tensor, actual: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL, both losses, agreement and the reference's top-1 probability per position.

    Of float32 logits ``[n, vocabulary]`` and targets ``[n]``.
    """
    kl, agree, log_p, log_q = compare_logits(expected, actual)
    index = targets.unsqueeze(-1)
    confidence = log_p.amax(dim=-1).exp()
    return kl, -log_p.gather(-1, index).squeeze(-1), -log_q.gather(-1, index).squeeze(-1), agree, confidence


def compare_logits(
    expected: torch.Tensor, actual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two models' float32 logits ``[..., classes]``, position by position.

    Returns:
        KL(expected || actual) in nats ``[...]``, whether both have the same largest logit (bool ``[...]``), and both
        log-probabilities ``[..., classes]``.
    """
    agree = expected.argmax(dim=-1) == actual.argmax(dim=-1)
    log_p = torch.log_softmax(expected, dim=-1)
    log_q = torch.log_softmax(actual, dim=-1)
    impossible = torch.isneginf(log_p)  # a masked vocabulary entry: p log p is 0, not NaN
    terms = (log_p - log_q).mul_(log_p.exp())
    if impossible.any():
        terms.masked_fill_(impossible, 0.0)
    # Rounding can leave a sum a hair below zero where both models agree to the last bit or nearly so.
    return terms.sum(dim=-1).clamp_(min=0.0), agree, log_p, log_q
