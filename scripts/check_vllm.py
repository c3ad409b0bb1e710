"""Our checkpoints in vLLM: which layouts does it load on a CPU, and does it compute what they say?

    python scripts/check_vllm.py [--model DIR] [--vllm PYTHON] [--only REGEX] [--fill README.md] [--json FILE]

Each row quantizes a model (data-free), converts it where the row says so, and asks vLLM for the probabilities of
held-out tokens and for greedy continuations of eight prompts in one batch, beside hf-quant's reference kernel in
float32. vLLM's packed CPU kernels compute in float16 or bfloat16 only; float16, which rounds less, is what shows a
wrong scale best. Where vLLM refuses, the row has its own words. ``--vllm`` is the Python of an environment with vLLM's
CPU build (by default one is made). With ``--json`` a run goes on where the file ends.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import (  # type: ignore[import-not-found]
    built_in_windows,
    default_model,
    label_of,
    publish,
    record,
    recorded,
)
from peer_environments import VLLM, last_words, make_environment  # type: ignore[import-not-found]
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.convert import convert

_MARKS = ("<!-- table:vllm -->", "<!-- /table:vllm -->")
_CHILD = Path(__file__).parent / "vllm_child.py"
_TEXT = "docs"
_PROMPTS = 8
_HEAD = (
    "| checkpoint | vLLM's kernel | perplexity: hf-quant, float32 | vLLM | largest Δ log p | same top token | "
    "same greedy answers | hf-quant, 16 bits |"
)
_RULE = "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"


@dataclass(frozen=True)
class Case:
    """One row: how a model is quantized and stored; ``kind`` names a small random model instead of the real one."""

    label: str
    options: dict[str, Any]
    to: str | None = None
    kind: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "initializer_range": 0.1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXTRAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_QWEN |= {"norm_topk_prob": True}
_HALF = {"scale_dtype": "float16"}  # what GPTQ and AWQ hold
CASES = (
    Case("int4 sym g32", {"group_size": 32}),
    Case("int4 sym g64", {"group_size": 64}),
    Case("int4 sym per channel", {"group_size": -1}),
    Case("int4 asym g32", {"group_size": 32, "symmetric": False}),
    Case("int4 asym g64", {"group_size": 64, "symmetric": False}),
    Case("int4 g64, some layers g32 or float", {"group_size": 64, "overrides": {
        "model.layers.1.self_attn": "float", "down_proj": {"group_size": 32}}}),
    Case("int4 g64, int8 down_proj", {"group_size": 64, "overrides": {"down_proj": {"bits": 8}}}),
    Case("int8 sym g64", {"bits": 8, "group_size": 64}),
    Case("int4 g64, int4 head of its own", {"group_size": 64, "overrides": {"lm_head": {"bits": 4}}}),
    Case("int4 g64, int4 embedding and head", {"group_size": 64, "overrides": {"embed_tokens": {"bits": 4}}}),
    Case("GPTQ int4 sym g64", {"group_size": 64, **_HALF}, to="gptq"),
    Case("GPTQ int4 asym g64", {"group_size": 64, "symmetric": False, **_HALF}, to="gptq"),
    Case("AWQ int4 sym g64", {"group_size": 64, **_HALF}, to="awq"),
    Case("AWQ int4 asym g64", {"group_size": 64, "symmetric": False, **_HALF}, to="awq"),
    Case("bitsandbytes nf4 g64", {"grid": "nf4"}),
    Case("Mixtral (random), int4 sym g32", {"group_size": 32}, kind="mixtral", settings=_MIXTRAL),
    Case("Mixtral (random), int4 asym g32", {"group_size": 32, "symmetric": False}, kind="mixtral", settings=_MIXTRAL),
    Case("Mixtral (random), float experts", {"group_size": 32, "skip": ["re:.*experts.*"]}, kind="mixtral",
         settings=_MIXTRAL),
    Case("Qwen3-MoE (random), int4 sym g32", {"group_size": 32}, kind="qwen3_moe", settings=_QWEN),
    Case("Qwen3-MoE (random), float experts", {"group_size": 32, "skip": ["re:.*experts.*"]}, kind="qwen3_moe",
         settings=_QWEN),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the rows and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="float checkpoint (default: the demo's SmolLM2)")
    parser.add_argument("--vllm", type=Path, help="Python with vLLM's CPU build (default: one is made)")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "hf-quant" / "envs")
    parser.add_argument("--only", default="", help="regular expression: rows to measure")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32, help="of each greedy continuation")
    parser.add_argument("--method", default="search", help="how scales are chosen; it matters little here")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--fill", type=Path, help="put the table between the marks of this file")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    python = options.vllm or make_environment("vllm", (VLLM,), options.envs)
    names = ("dtype", "windows", "length", "tokens", "method")
    protocol = {"model": label_of(options.model), **{name: getattr(options, name) for name in names}}
    rows = recorded(options.json, protocol)
    for case in CASES:
        if case.label not in rows and re.search(options.only, case.label):
            with tempfile.TemporaryDirectory() as folder:
                rows[case.label] = {"key": case.label, **measure(case, options, python, Path(folder))}
            record(options.json, {**protocol, "rows": list(rows.values())})
            print(json.dumps(rows[case.label]), file=sys.stderr, flush=True)
    lines = [_HEAD, _RULE, *(line_of(rows[case.label]) for case in CASES if case.label in rows)]
    publish([*lines, "", note(protocol, list(rows.values()))], options.markdown, options.fill, _MARKS)


def measure(case: Case, options: argparse.Namespace, python: Path, folder: Path) -> dict[str, Any]:
    """The figures of one row, or why there are none."""
    model = options.model or default_model()
    if case.kind is None:
        ids = built_in_windows(AutoTokenizer.from_pretrained(model), options.windows, options.length, seed=0)[_TEXT].ids
    else:
        model = _random(case, folder / "float")
        ids = torch.randint(3, _SIZES["vocab_size"], (options.windows, options.length))
    checkpoint = folder / "quantized"
    hf_quant.quantize(str(model), HfQuantConfig(method=options.method, **case.options), checkpoint)
    if case.to is not None:
        converted = folder / "converted"
        convert(checkpoint, converted, case.to)
        checkpoint = converted
    windows = ids.tolist()
    prompts = [windows[i % len(windows)][: 12 + 3 * i] for i in range(_PROMPTS)]
    request = {"model": str(checkpoint), "dtype": options.dtype, "windows": windows, "prompts": prompts}
    said, log = run(python, {**request, "tokens": options.tokens})
    kernels = sorted(set(re.findall(r"Using (\w+(?:Kernel|Experts|MoE\w*))\b", log)))
    if said is None:
        return {"refused": root_cause(log), "kernels": kernels}
    ours = hf_quant.load(checkpoint, kernel="reference", dtype=torch.float32)
    with torch.no_grad():
        scores = torch.stack([ours(row[None]).logits[0] for row in ids]).log_softmax(-1)[:, :-1]
    logprobs = scores.gather(-1, ids[:, 1:, None]).squeeze(-1)
    answers = [_greedy(ours, prompt, options.tokens) for prompt in prompts]
    rounding = hf_quant.load(checkpoint, dtype=getattr(torch, options.dtype))  # how much of it is the dtype
    rounded = [_greedy(rounding, prompt, options.tokens) for prompt in prompts]
    return {
        "kernels": kernels,
        "version": said["version"],
        "perplexity": float((-logprobs.mean()).exp()),
        "perplexity_vllm": float((-torch.tensor(said["logprobs"]).mean()).exp()),
        "largest_difference": float((torch.tensor(said["logprobs"]) - logprobs).abs().max()),
        "top1": float((torch.tensor(said["top"]) == scores.argmax(-1)).float().mean()),
        "same": sum(ours == theirs for ours, theirs in zip(answers, said["generated"], strict=True)),
        "same_rounded": sum(ours == theirs for ours, theirs in zip(answers, rounded, strict=True)),
        "prompts": len(prompts),
    }


def _random(case: Case, directory: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.kind, **{**_SIZES, **case.settings})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def _greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    limits = {"max_new_tokens": tokens, "min_new_tokens": tokens}  # vLLM is told to ignore the end, too
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **limits)
    return list(found[0, len(prompt) :].tolist())


def run(python: Path, request: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """What vLLM says of a checkpoint (None: it failed), and its log."""
    # the kernels are what is looked at: one process for the engine, little memory for keys and values
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    command = [str(python), str(_CHILD)]
    child = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, check=False, env=environment
    )
    log = child.stderr + child.stdout
    found = next((line for line in child.stdout.splitlines() if line.startswith('{"version"')), None)
    return (json.loads(found) if found and not child.returncode else None), log


def root_cause(log: str) -> str:
    """The first error of a log of several processes that says what went wrong: at most 200 characters."""
    lines = [line for line in log.splitlines() if not re.match(r"(\(.*?pid=\d+\) )?(INFO|WARNING) ", line)]
    lines = [re.sub(r"^\(.*?pid=\d+\) ERROR \S+ \S+ \[.*?\] ", "", line) for line in lines]
    errors = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception): ", line)]
    errors = [i for i in errors if not re.search("root cause|initialization failed", lines[i])]
    if not errors:
        return str(last_words(log))
    # kernels and pydantic say why in the lines after
    said = re.sub(r"\s+", " ", " ".join(lines[errors[0] : errors[0] + 3]).partition("[type=")[0])
    return said if len(said) <= 200 else said[:199] + "…"


def line_of(row: dict[str, Any]) -> str:
    """The row of the table."""
    if "refused" in row:
        return f"| {row['key']} | refused: {row['refused'].replace('|', '/')} | | | | | | |"
    figures = f"{row['perplexity']:.3f} | {row['perplexity_vllm']:.3f} | {row['largest_difference']:.2g}"
    same = f"{row['top1']:.1%} | {row['same']} of {row['prompts']} | {row['same_rounded']} of {row['prompts']}"
    return f"| {row['key']} | {', '.join(row['kernels'])} | {figures} | {same} |"


def note(protocol: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """What was measured on what."""
    version = next((row["version"] for row in rows if "version" in row), "")
    return (
        f"{protocol['model']}, quantized without data, {protocol['windows']} windows of {protocol['length']} held-out "
        f"tokens; vLLM {version} (CPU build), {protocol['dtype']}; {protocol['tokens']} greedy tokens after each of "
        f"{_PROMPTS} prompts in one batch, beside hf-quant's in float32; the last column: hf-quant in "
        f"{protocol['dtype']} beside itself in float32."
    )


if __name__ == "__main__":
    main()
