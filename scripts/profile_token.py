"""Where a generated token's time goes on a CPU: torch ops and microseconds per token, decoder, head and the rest.

usage: python scripts/profile_token.py QUANTIZED [--dense FLOAT] [--dtype bfloat16] [--prompt 32] [--tokens 64]
                                       [--rounds 5] [--threads 2] [--activations float] [--json FILE]

Contenders take turns, one `generate` each per round, so that a busy machine is unfair to none: the quantized checkpoint
with the fused decoder, the same with it switched off, and the float checkpoint in plain transformers. Times are medians
over rounds of the time between two tokens (the prefill is left out).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import hf_quant
from hf_quant.nn.forwards import replaced_forwards
from hf_quant.nn.fused import switch

Run = Callable[[int], list[float]]


@dataclass(frozen=True)
class Row:
    """One contender; times in microseconds per token."""

    name: str
    tokens_per_second: float
    token: float
    fastest: float
    decoder: float
    head: float
    rest: float
    ops: float


class _Clock(BaseStreamer):
    """A streamer that notes when each token arrives; the first call is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def generate(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> list[float]:
    """Seconds between consecutive tokens of one greedy generation."""
    clock = _Clock()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        streamer=clock,
    )
    times = clock.times[1:]
    return [after - before for before, after in pairwise(times)]


@contextmanager
def timed(modules: dict[str, torch.nn.Module]) -> Iterator[dict[str, list[float]]]:
    """Inside, the seconds of every call of a module are listed under its name."""
    spent: dict[str, list[float]] = {name: [] for name in modules}

    def around(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = forward(*args, **kwargs)
            spent[name].append(time.perf_counter() - start)
            return result

        return run

    with replaced_forwards([(module, around(name, module.forward)) for name, module in modules.items()]):
        yield spent


def shares(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> tuple[float, float, float]:
    """Median microseconds per token in the decoder, in the head, and in everything else of ``generate``."""
    with timed({"decoder": model.get_decoder(), "head": model.get_output_embeddings()}) as spent:
        steps = generate(model, prompt, tokens)
    decoder, head = spent["decoder"][1:], spent["head"][1:]  # the first call is the prefill
    rest = [step - one - two for step, one, two in zip(steps, decoder, head, strict=True)]
    return tuple(statistics.median(seconds) * 1e6 for seconds in (decoder, head, rest))  # type: ignore[return-value]


def count_ops(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """Torch ops per token (nested ones included): those of a run of 9 tokens less those of a run of 1."""
    counts = []
    for tokens in (1, 9):
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            generate(model, prompt, tokens)
        counts.append(sum(event.count for event in trace.key_averages() if "::" in event.key))
    return (counts[1] - counts[0]) / 8


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantized")
    parser.add_argument("--dense")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--activations", default="float", choices=("float", "int8"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    os.environ["HF_QUANT_ACTIVATIONS"] = options.activations
    quantized = hf_quant.load(options.quantized, dtype=dtype).eval()
    contenders: dict[str, tuple[PreTrainedModel, bool]] = {
        "quantized, fused": (quantized, True),
        "quantized": (quantized, False),
    }
    if options.dense:
        dense = AutoModelForCausalLM.from_pretrained(options.dense, dtype=dtype).eval()
        contenders[f"transformers {options.dtype}"] = (dense, False)
    prompt = torch.randint(100, 1000, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    steps: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, (model, fused) in contenders.items():
            with switch(fused):
                steps[name].append(statistics.median(generate(model, prompt, options.tokens)))
    rows = []
    for name, (model, fused) in contenders.items():
        with switch(fused):
            token, fastest = statistics.median(steps[name]) * 1e6, min(steps[name]) * 1e6
            rows.append(
                Row(name, 1e6 / token, token, fastest, *shares(model, prompt, options.tokens), count_ops(model, prompt))
            )
    table = Table(title=f"{options.quantized}, {options.threads} threads, prompt {options.prompt}, {sys.platform}")
    for column in ("", "tok/s", "µs per token", "best round", "decoder", "head", "rest", "torch ops"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        figures = (row.token, row.fastest, row.decoder, row.head, row.rest, row.ops)
        table.add_row(row.name, f"{row.tokens_per_second:.1f}", *(f"{figure:.0f}" for figure in figures))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
