"""Speed of models that take turns: first token, prefill and decode, alone and eight at once; the kernels that ran."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.pytorch_utils import Conv1D

from hf_quant.evaluation.examination import placed
from hf_quant.evaluation.machine import read_bandwidth
from hf_quant.evaluation.results import SpeedResult, ThroughputResult
from hf_quant.evaluation.size import token_bytes
from hf_quant.evaluation.sources import synchronize

PREFILL_TOKENS = 512
DECODE_TOKENS = 64
PASSES = 32
BATCH = 8
BATCH_PREFILL_TOKENS = 128
_PROMPT_TOKENS = 16


@dataclass
class Subject:
    """One of the models that take turns."""

    role: Literal["float", "quantized"]
    model: PreTrainedModel
    load_seconds: float
    peak_bytes: int | None = None
    prefill: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    batch_prefill: list[float] = field(default_factory=list)
    batch_decode: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


class _Clock(StoppingCriteria):
    """Notes when each new token was there; never stops."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        synchronize(str(self.device))
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def measure(
    subjects: list[Subject],
    ids: torch.Tensor,
    *,
    repeats: int = 3,
    decode_tokens: int = DECODE_TOKENS,
    advance: Callable[[], None] | None = None,
) -> tuple[SpeedResult, ...]:
    """Median speeds at batch 1 and 8, each model once to warm up and then ``repeats`` times, in turns.

    In turns, so that a machine that slows down or is disturbed slows them all.

    Args:
        subjects: the models.
        ids: int64 ``[tokens]``: real text for the prompts, at least ``PREFILL_TOKENS`` unless the models' context is
            shorter.
        repeats: timed runs per model.
        decode_tokens: new tokens of a greedy generate(), after a short prompt; the first one is not timed.
        advance: called after each model's turn, ``len(subjects) * (repeats + 1)`` times.
    """
    prefill_ids, prompt, decode_tokens = _prompts(ids, [subject.model for subject in subjects], decode_tokens)
    room = min(BATCH_PREFILL_TOKENS, prefill_ids.shape[1], len(ids) // BATCH)
    batch_ids = ids[: BATCH * room].view(BATCH, room)
    batch_prompts = batch_ids[:, :_PROMPT_TOKENS]
    bandwidth = read_bandwidth() if all(subject.device.type == "cpu" for subject in subjects) else None
    for turn in range(repeats + 1):
        for subject in subjects:
            seconds = (
                _prefill(subject, prefill_ids),
                _first_token(subject, prefill_ids),
                _decode(subject, prompt, decode_tokens),
                _prefill(subject, batch_ids),
                _decode(subject, batch_prompts, decode_tokens),
            )
            if turn:
                subject.prefill.append(prefill_ids.shape[1] / seconds[0])
                subject.first_token.append(seconds[1])
                subject.decode.append((decode_tokens - 1) / seconds[2])
                subject.batch_prefill.append(batch_ids.numel() / seconds[3])
                subject.batch_decode.append(BATCH * (decode_tokens - 1) / seconds[4])
            if advance is not None:
                advance()
    return tuple(
        SpeedResult(
            **_described(subject),
            prefill_tokens=prefill_ids.shape[1],
            prefill_tokens_per_second=statistics.median(subject.prefill),
            first_token_seconds=statistics.median(subject.first_token),
            decode_tokens=decode_tokens,
            decode_tokens_per_second=statistics.median(subject.decode),
            batch=BATCH,
            batch_prefill_tokens=batch_ids.shape[1],
            batch_prefill_tokens_per_second=statistics.median(subject.batch_prefill),
            batch_decode_tokens_per_second=statistics.median(subject.batch_decode),
            peak_bytes=subject.peak_bytes,
            token_bytes=token_bytes(subject.model),
            read_bandwidth=bandwidth,
            repeats=repeats,
        )
        for subject in subjects
    )


def run_once(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """The prompt of :func:`measure` and a few tokens, for what a model needs when it runs; not timed."""
    subject = Subject("quantized", model, 0.0)
    prefill_ids, prompt, decode_tokens = _prompts(ids, [model], 2)
    _prefill(subject, prefill_ids)
    _decode(subject, prompt, decode_tokens)


def _prompts(
    ids: torch.Tensor, models: Sequence[PreTrainedModel], decode_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(a long prompt ``[1, tokens]``, a short one, how many tokens there is room for after it) that suit all models."""
    room = min(_context(model) for model in models)
    prefill_ids = ids[: min(PREFILL_TOKENS, len(ids), room)].unsqueeze(0)
    return prefill_ids, ids[:_PROMPT_TOKENS].unsqueeze(0), max(2, min(decode_tokens, room - _PROMPT_TOKENS))


def measure_passes(
    subjects: list[Subject],
    inputs: Sequence[Mapping[str, torch.Tensor]],
    unit: str,
    *,
    repeats: int = 3,
    advance: Callable[[], None] | None = None,
) -> tuple[ThroughputResult, ...]:
    """Median samples per second of plain forward passes at batch 1, for models that continue no text.

    In turns as in :func:`measure`.

    Args:
        subjects: the models.
        inputs: keyword arguments of their forward, one sample each; at most ``PASSES`` are used.
        unit: what a sample is called.
        repeats: timed rounds per model, after one to warm up.
        advance: called after each model's turn.
    """
    inputs = inputs[:PASSES]
    for turn in range(repeats + 1):
        for subject in subjects:
            ready = [placed(one, subject.model) for one in inputs]
            synchronize(str(subject.device))
            start = time.perf_counter()
            with torch.no_grad():
                for one in ready:
                    subject.model(**one)
            synchronize(str(subject.device))
            if turn:
                subject.passes.append(len(ready) / (time.perf_counter() - start))
            if advance is not None:
                advance()
    return tuple(
        ThroughputResult(
            **_described(subject),
            unit=unit,
            samples=len(inputs),
            samples_per_second=statistics.median(subject.passes),
            repeats=repeats,
        )
        for subject in subjects
    )


def _described(subject: Subject) -> dict[str, Any]:
    """What every result says of a subject."""
    return {
        "model": subject.role,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "kernels": kernels(subject.model),
        "threads": torch.get_num_threads(),
        "load_seconds": subject.load_seconds,
    }


def kernels(model: nn.Module) -> dict[str, int]:
    """How many linear layers each kernel runs; ``float`` is torch's own linear, other libraries go by their names.

    Where a kernel has a choice, its name says what it did with the activations: ``native (int8 activations)``.
    """
    counts: Counter[str] = Counter()
    for module in model.modules():
        package = type(module).__module__.partition(".")[0]
        name = getattr(module, "kernel_label", None)
        if isinstance(name, str):
            counts[name] += 1
        elif isinstance(module, nn.Linear | Conv1D) or (
            package not in ("torch", "transformers") and _is_linear(module)
        ):
            counts["float" if type(module) in (nn.Linear, Conv1D) else f"{package} {type(module).__name__}"] += 1
    return dict(counts.most_common())


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _context(model: PreTrainedModel) -> int:
    """The longest sequence the model has positions for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else PREFILL_TOKENS + DECODE_TOKENS


@torch.no_grad()
def _prefill(subject: Subject, ids: torch.Tensor) -> float:
    """Seconds for one forward pass that fills the cache and gives the next token's logits."""
    ids = ids.to(subject.device)
    synchronize(str(subject.device))
    start = time.perf_counter()
    try:
        subject.model(input_ids=ids, use_cache=True, logits_to_keep=1)
    except TypeError:  # a model from before logits_to_keep computes every position's
        start = time.perf_counter()
        subject.model(input_ids=ids, use_cache=True)
    synchronize(str(subject.device))
    return time.perf_counter() - start


@torch.no_grad()
def _first_token(subject: Subject, ids: torch.Tensor) -> float:
    """Seconds from a call of generate() to its first token."""
    ids = ids[:, : _context(subject.model) - 1]
    synchronize(str(subject.device))
    start = time.perf_counter()
    return _generate(subject, ids, 1)[0] - start


@torch.no_grad()
def _decode(subject: Subject, prompt: torch.Tensor, new_tokens: int) -> float:
    """Seconds from the first new token to the last one of a greedy generate()."""
    times = _generate(subject, prompt, new_tokens)
    return times[-1] - times[0]


def _generate(subject: Subject, prompt: torch.Tensor, new_tokens: int) -> list[float]:
    """When each new token of a greedy generate() was there; of ``prompt`` ``[sequences, tokens]``."""
    clock = _Clock(subject.device)
    own = subject.model.generation_config
    eos = own.eos_token_id if own is not None else None
    first = eos[0] if isinstance(eos, list) else eos
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        eos_token_id=eos,
        pad_token_id=first if first is not None else 0,
    )
    ids = prompt.to(subject.device)
    subject.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return clock.times
