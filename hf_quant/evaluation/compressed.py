"""The float model's predictions, compressed to the likeliest tokens and a sample of the others, and what they tell.

Per position the ``kept`` likeliest tokens T are stored with their log-probabilities, and ``drawn`` tokens drawn with
replacement from the others in proportion to their probability. With P and Q the probability that the float model and
the other one give to all tokens outside of T,

    KL = sum over T of p log(p / q)  +  P log(P / Q)  +  P E[(w - 1) - log w],   w = (q / Q) / (p / P),

where the expectation is over the float model's distribution outside of T; the drawn tokens estimate it. The first two
terms alone (all other tokens as one) are a lower bound (the log sum inequality) and miss several percent. The third is
estimated without bias; every sample of it is at least 0 and close to 0 where the models agree, which is why E[w] = 1 is
used as a control variate (Schulman, "Approximating KL divergence", 2020). Drawing from the teacher's tail is the
remedy of "Sparse Logit Sampling" (Anshumann et al., ACL 2025) for the bias of top-k distillation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from hf_quant.evaluation.divergence import Array, Divergence, Reference, check_finite, check_vocabulary
from hf_quant.evaluation.stream import LogitStream, chunks

KEPT = 64
DRAWN = 64


@dataclass(frozen=True)
class Compressed:
    """What is kept of the float model on the windows of one text (``n = length - 1`` scored positions).

    Attributes:
        ids: int64 ``[windows, length]``.
        vocabulary: logits per token.
        tokens: int32 ``[windows, n, kept + drawn]``: the likeliest, most likely first, then those that were drawn (none
            where the vocabulary has no more than ``kept``).
        log_p: float32, their log-probabilities.
        log_tail: float32 ``[windows, n]``: of all tokens but the kept ones together; -inf where there are none.
        top: int32 ``[windows, n]``: the most likely token.
        nll: float32 ``[windows, n]``: of the token that followed.
    """

    ids: torch.Tensor
    vocabulary: int
    tokens: torch.Tensor
    log_p: torch.Tensor
    log_tail: torch.Tensor
    top: torch.Tensor
    nll: torch.Tensor


@torch.no_grad()
def compress(reference: Reference, seed: int, advance: Callable[[], None] | None = None) -> Compressed:
    """Keep what :func:`compare_compressed` needs: 8 bytes per token kept or drawn and 12 more, per position.

    Args:
        reference: the float model, its backbone has run.
        seed: of the draws.
        advance: called after each window.

    Raises:
        EvaluationError: a loss that is not finite.
    """
    stream, ids = reference.stream, reference.ids
    windows, scored = ids.shape[0], ids.shape[1] - 1
    kept = min(KEPT, stream.vocabulary)
    width = kept + (DRAWN if stream.vocabulary > kept else 0)
    found = Compressed(
        ids=ids,
        vocabulary=stream.vocabulary,
        tokens=torch.empty((windows, scored, width), dtype=torch.int32),
        log_p=torch.empty((windows, scored, width)),
        log_tail=torch.empty((windows, scored)),
        top=torch.empty((windows, scored), dtype=torch.int32),
        nll=torch.empty((windows, scored)),
    )
    generator = torch.Generator().manual_seed(seed)
    for window, row in enumerate(ids):
        for start, stop in chunks(scored, stream.chunk):
            logits = stream.logits(reference.hidden[window], start, stop).cpu()
            log_p = torch.log_softmax(logits, dim=-1)
            tokens = log_p.topk(kept, dim=-1).indices
            tail = log_p.scatter(-1, tokens, -torch.inf)
            log_tail = tail.logsumexp(dim=-1)
            if width > kept:
                shares = (tail.double() - log_tail.double().unsqueeze(-1)).exp_()
                shares[torch.isneginf(log_tail)] = 1.0  # drawn and counted with a weight of zero
                drawn = torch.multinomial(shares, DRAWN, replacement=True, generator=generator)
                tokens = torch.cat((tokens, drawn), dim=-1)
            found.tokens[window, start:stop] = tokens
            found.log_p[window, start:stop] = log_p.gather(-1, tokens)
            found.log_tail[window, start:stop] = log_tail
            found.top[window, start:stop] = logits.argmax(dim=-1)
            targets = row[start + 1 : stop + 1].cpu().unsqueeze(-1)
            found.nll[window, start:stop] = -log_p.gather(-1, targets).squeeze(-1)
        check_finite(stream.name, found.nll[window].numpy(), window)
        if advance is not None:
            advance()
    return found


@torch.no_grad()
def compare_compressed(
    reference: Compressed, stream: LogitStream, advance: Callable[[], None] | None = None
) -> Divergence:
    """Compare a model with what was kept of the reference.

    Perplexities, agreement and confidence are those of :func:`hf_quant.evaluation.divergence.compare`; the divergence
    is estimated, with its variance per position. Raises EvaluationError when the vocabularies differ or a loss is not
    finite.
    """
    check_vocabulary(stream.name, stream.vocabulary, "the reference", reference.vocabulary)
    windows, scored = reference.nll.shape
    kl, variance, nll = (np.empty((windows, scored)) for _ in range(3))
    agree = np.empty((windows, scored), dtype=np.bool_)
    for window, row in enumerate(reference.ids):
        hidden = stream.hidden(row.unsqueeze(0))
        for start, stop in chunks(scored, stream.chunk):
            logits = stream.logits(hidden, start, stop).cpu()
            log_q = torch.log_softmax(logits, dim=-1)
            here = (window, slice(start, stop))
            kl[here], variance[here] = _estimate(
                reference.tokens[here].long(), reference.log_p[here], reference.log_tail[here], log_q
            )
            targets = row[start + 1 : stop + 1].cpu().unsqueeze(-1)
            nll[here] = -log_q.gather(-1, targets).squeeze(-1).numpy()
            agree[here] = (logits.argmax(dim=-1) == reference.top[here]).numpy()
        check_finite(stream.name, nll[window], window)
        if advance is not None:
            advance()
    confidence = reference.log_p[..., 0].exp().double().numpy()
    return Divergence(kl, reference.nll.double().numpy(), nll, agree, confidence, variance)


def _estimate(
    tokens: torch.Tensor, log_p: torch.Tensor, log_tail: torch.Tensor, log_q: torch.Tensor
) -> tuple[Array, Array]:
    """(KL, variance of its estimate) per position.

    Args:
        tokens: int64 ``[n, kept + drawn]``.
        log_p: float32 of the same shape.
        log_tail: float32 ``[n]``.
        log_q: float32 ``[n, vocabulary]``, of the other model.
    """
    kept = min(KEPT, log_q.shape[-1])
    log_p, p_tail = log_p.double(), log_tail.double()
    theirs = log_q.gather(-1, tokens).double()
    terms = log_p[:, :kept].exp() * (log_p[:, :kept] - theirs[:, :kept])
    kl = terms.masked_fill(torch.isneginf(log_p[:, :kept]), 0.0).sum(dim=-1)  # p log p is 0 there, not NaN
    variance = torch.zeros_like(kl)
    if tokens.shape[-1] > kept:
        q_tail = log_q.scatter(-1, tokens[:, :kept], -torch.inf).logsumexp(dim=-1).double()
        log_w = (theirs[:, kept:] - q_tail.unsqueeze(-1)) - (log_p[:, kept:] - p_tail.unsqueeze(-1))
        samples = torch.expm1(log_w) - log_w
        share = p_tail.exp()
        somewhere = share > 0
        kl += torch.where(somewhere, share * (p_tail - q_tail + samples.mean(dim=-1)), 0.0)
        variance = torch.where(somewhere, share.square() * samples.var(dim=-1) / samples.shape[-1], 0.0)
    return kl.clamp_(min=0.0).numpy(), variance.numpy()
