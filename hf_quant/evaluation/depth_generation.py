"""Greedy answers to built-in prompts: how many of the float model's tokens another model chooses before it diverges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_quant.cache_name import CACHE, cache_of
from hf_quant.evaluation.bootstrap import Bootstrap
from hf_quant.evaluation.depth_results import GenerationDepth, PromptAgreement
from hf_quant.evaluation.interval import Interval
from hf_quant.evaluation.stream import LogitStream, chunks

NEW_TOKENS = 64
PROMPTS = {
    "capital": "What is the capital of France, and what is it known for?",
    "primes": "List the first ten prime numbers and explain what a prime number is.",
    "letter": "Write a short, polite letter that asks a neighbour to keep the noise down at night.",
    "code": "Write a Python function that returns the factorial of a number.",
    "summary": "Summarise in one sentence: The ship left the harbour at dawn, met a storm near the cape, "
    "lost its mast, and came home a week late with all hands safe.",
    "science": "Why is the sky blue during the day and red at sunset?",
    "recipe": "Give me a simple recipe for pancakes with the amounts of each ingredient.",
    "translation": "Translate into German: The train to Berlin leaves at seven in the morning.",
}


@dataclass(frozen=True)
class Answer:
    """What the float model said: ``ids [1, prompt + answer]``, of which ``prompt`` tokens are the prompt."""

    name: str
    ids: torch.Tensor
    prompt: int

    @property
    def tokens(self) -> int:
        """Length of the answer."""
        return int(self.ids.shape[1]) - self.prompt


def prompt_ids(tokenizer: Any) -> dict[str, torch.Tensor]:
    """Name -> int64 ``[1, tokens]`` of the built-in prompts, through the chat template where there is one."""
    found = {}
    for name, prompt in PROMPTS.items():
        text = prompt
        if chat := getattr(tokenizer, "chat_template", None):
            message = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=not chat, return_tensors="pt")["input_ids"]
        found[name] = ids.to(torch.int64)
    return found


@torch.no_grad()
def answers(model: Any, prompts: dict[str, torch.Tensor], advance: Callable[[], None]) -> list[Answer]:
    """Greedy answers of up to NEW_TOKENS tokens, one prompt at a time; no penalties, whatever the model's defaults."""
    device = next(model.parameters()).device
    given = getattr(model, "generation_config", None)
    ends = getattr(given, "eos_token_id", None)
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    found = []
    for name, ids in prompts.items():
        most = min(NEW_TOKENS, room - ids.shape[1])
        found.append(Answer(name, _greedy(model, ids.to(device), most, stops).cpu(), ids.shape[1]))
        advance()
    return [answer for answer in found if answer.tokens]


def _greedy(model: Any, ids: torch.Tensor, most: int, stops: set[int]) -> torch.Tensor:
    step, cache = ids, None
    for _ in range(most):
        output = model(input_ids=step, use_cache=True, **{CACHE: cache})
        cache = cache_of(output)
        token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        if int(token) in stops:
            break
        step = token if cache is not None else ids  # models without a cache of this name read everything again
    return ids


@torch.no_grad()
def until_divergence(stream: LogitStream, given: Sequence[Answer], advance: Callable[[], None]) -> list[int]:
    """How many tokens of each answer a model's greedy decoding gives before its first other one.

    Until then it reads the same tokens as the float model did, so one pass over the answer tells what it would choose.
    """
    found = []
    for answer in given:
        hidden = stream.hidden(answer.ids)
        same = []
        for start, stop in chunks(answer.tokens, stream.chunk):
            first = answer.prompt - 1 + start
            chosen = stream.logits(hidden, first, first + stop - start).argmax(dim=-1).cpu()
            same.append(chosen == answer.ids[0, first + 1 : first + 1 + stop - start])
        found.append(int(torch.cat(same).long().cumprod(dim=0).sum()))
        advance()
    return found


def generation_result(
    given: Sequence[Answer],
    measured: Sequence[int],
    floor: Sequence[int] | None,
    chat: bool,
    samples: int,
    seed: int,
) -> GenerationDepth | None:
    """The recorded form; None with fewer than two answers."""
    if len(given) < 2:
        return None
    bootstrap = Bootstrap(len(given), samples, seed)

    def interval(values: Sequence[float]) -> Interval:
        return bootstrap.interval(np.asarray(values, dtype=np.float64))

    def whole(counts: Sequence[int]) -> list[float]:
        return [float(count == answer.tokens) for count, answer in zip(counts, given, strict=True)]

    below = list(floor) if floor is not None else [None] * len(given)
    return GenerationDepth(
        prompts=tuple(
            PromptAgreement(name=answer.name, tokens=answer.tokens, until_divergence=count, noise_floor=other)
            for answer, count, other in zip(given, measured, below, strict=True)
        ),
        chat_template=chat,
        most=NEW_TOKENS,
        until_divergence=interval(list(measured)),
        identical=interval(whole(measured)),
        noise_floor_until_divergence=None if floor is None else interval(list(floor)),
        noise_floor_identical=None if floor is None else interval(whole(floor)),
    )
