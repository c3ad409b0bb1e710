"""OpenVINO directories in optimum-intel and openvino-genai: do they compute and generate what the checkpoint does?

    python scripts/check_openvino.py [--model DIR] [--optimum PYTHON] [--fill README.md] [--json FILE]

Each row quantizes the model, converts the checkpoint with ``hf-quant convert --to openvino`` (pip install
hf-quant[openvino]) and runs the directory with ``OVModelForCausalLM`` and ``LLMPipeline`` on the CPU, once with the
plugin's defaults and once in float32 (inference, cache, inputs of layers), where only the order of summation is left.
Exits with an error when the plugin does not keep the weights packed. Rows that ``--json`` holds from an earlier run are
not measured again. ``--optimum`` is the Python of an environment with
optimum-intel and openvino-genai (by default one is made: it wants an older transformers than hf-quant).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from check_gguf import perplexity  # type: ignore[import-not-found]
from measuring import (  # type: ignore[import-not-found]
    built_in_windows,
    default_model,
    float_model,
    label_of,
    publish,
    record,
    recorded,
)
from peer_environments import make_environment  # type: ignore[import-not-found]
from torch.nn import functional
from transformers import AutoTokenizer

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.convert import convert
from hf_quant.export import openvino_file

_MARKS = ("<!-- table:openvino -->", "<!-- /table:openvino -->")
_CHILD = Path(__file__).parent / "openvino_child.py"
_PACKAGES = ("optimum-intel[openvino]==2.2.0", "openvino==2026.4.1", "openvino-genai==2026.4.1.0")
_PROMPT = "What is the capital of France?"
_TEXT = "docs"
_TOKENS = 32
_HEAD = (
    "| checkpoint | MB | weights at run time | perplexity hf-quant | OpenVINO float32 | defaults "
    "| KL float32 | defaults | same top token, defaults | same greedy tokens, float32 |"
)
_RULE = "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"


@dataclass(frozen=True)
class Case:
    """One row: how the model is quantized, and the type that its linear layers have to have at run time."""

    label: str
    options: dict[str, Any]
    type: str


# each type of weight once: neither other groups nor other zero points are other code in OpenVINO
CASES = (
    Case("int4 sym g32", {"group_size": 32}, "i4"),
    Case(
        "int4 asym g32, int8 embedding and head",
        {"group_size": 32, "symmetric": False, "overrides": {"embed_tokens": {"bits": 8}}},
        "u4",
    ),
    Case("int8 sym per channel", {"bits": 8, "group_size": -1}, "i8"),
    Case("int8 asym g64", {"bits": 8, "group_size": 64, "symmetric": False}, "u8"),
    Case("nf4 g64", {"grid": "nf4", "group_size": 64}, "nf4"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the rows and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="float checkpoint (default: the demo's SmolLM2)")
    parser.add_argument("--optimum", type=Path, help="Python with optimum-intel (default: one is made)")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "hf-quant" / "envs")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--method", default="search", help="how scales are chosen; it matters little here")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--fill", type=Path, help="put the table between the marks of this file")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    model = options.model or default_model()
    python = options.optimum or make_environment("optimum-intel", _PACKAGES, options.envs)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = built_in_windows(tokenizer, options.windows, options.length, seed=0)[_TEXT].ids
    chat = [{"role": "user", "content": _PROMPT}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    protocol = {
        "model": label_of(options.model),
        "windows": [options.windows, options.length],
        "method": options.method,
    }
    rows = recorded(options.json, protocol)
    for case in CASES:
        if case.label not in rows:
            with tempfile.TemporaryDirectory() as folder:
                rows[case.label] = measure(case, model, python, ids, prompt, Path(folder), options.method)
            print(json.dumps(rows[case.label]), file=sys.stderr, flush=True)
            record(options.json, {**protocol, "rows": list(rows.values())})
    with torch.no_grad():
        plain = perplexity(np.stack([float_model(model)(row[None]).logits[0].numpy() for row in ids]), ids)
    found = [rows[case.label] for case in CASES]
    versions = found[0]["versions"]
    note = (
        f"{label_of(options.model)} (float32: perplexity {plain:.3f}), {options.windows} windows of {options.length} "
        f"held-out tokens; OpenVINO {versions['openvino']} through optimum-intel {versions['optimum-intel']} with "
        f"transformers {versions['transformers']}. KL(hf-quant ‖ OpenVINO) in nats per token; of {_TOKENS} "
        "greedy tokens those that are `generate`'s on the dequantized weights, up to the first difference, in "
        "optimum-intel and in openvino-genai."
    )
    publish([_HEAD, _RULE, *(line_of(row) for row in found), "", note], options.markdown, options.fill, _MARKS)


def measure(
    case: Case, model: Path, python: Path, ids: torch.Tensor, prompt: str, folder: Path, method: str
) -> dict[str, Any]:
    """The figures of one row."""
    hf_quant.quantize(str(model), HfQuantConfig(method=method, **case.options), folder / "quantized")
    convert(folder / "quantized", folder / "openvino", "openvino")
    threads = {"INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
    exact = run(python, folder, ids, prompt, {**threads, **openvino_file.EXACTLY})
    default = run(python, folder, ids, prompt, threads)
    for said, _ in (exact, default):
        layers = sum(count for kind, count in said["weights"].items() if kind == case.type)
        if layers < sum(said["weights"].values()) - 1 or not said["attention"]:  # the head may have a type of its own
            sys.exit(f"{case.label}: OpenVINO multiplies with {said['weights']}, attention {said['attention']}")
    # the reference kernel makes the float weight for every product; these are the same weights, made once
    reference = hf_quant.load(folder / "quantized", kernel="reference", dtype=torch.float32).dequantize()
    given = torch.tensor([exact[0]["ids"]])
    with torch.no_grad():
        ours = np.stack([reference(row[None]).logits[0].numpy() for row in ids])
        answer = reference.generate(given, max_new_tokens=_TOKENS, do_sample=False)[0, given.shape[1] :].tolist()
    tokenizer = AutoTokenizer.from_pretrained(model)
    in_genai = tokenizer(exact[0]["text"], add_special_tokens=False)["input_ids"]
    without_end = [token for token in answer if token not in tokenizer.all_special_ids]
    return {
        "key": case.label,
        "label": case.label,
        "bytes": sum(file.stat().st_size for file in (folder / "openvino").glob("openvino_model.*")),
        "weights": exact[0]["weights"],
        "perplexity": perplexity(ours, ids),
        "float32": divergence(ours, exact[1], ids),
        "defaults": divergence(ours, default[1], ids),
        "same_tokens": [same(answer, exact[0]["tokens"]), same(without_end, in_genai)],
        "tokens": [len(answer), len(without_end)],
        "versions": exact[0]["versions"],
    }


def divergence(ours: np.ndarray, theirs: np.ndarray, ids: torch.Tensor) -> dict[str, float]:
    """How far logits ``[windows, length, vocabulary]`` are from ours."""
    first, second = (functional.log_softmax(torch.from_numpy(logits).double(), dim=-1) for logits in (ours, theirs))
    return {
        "perplexity": perplexity(theirs, ids),
        "kl": max(0.0, float((first.exp() * (first - second)).sum(-1).mean())),
        "top1": float((first.argmax(-1) == second.argmax(-1)).double().mean()),
        "logit_difference": float(np.abs(ours - theirs).max()),
    }


def same(ours: list[int], theirs: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    pairs = list(zip(ours, theirs, strict=False))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))


def run(
    python: Path, folder: Path, ids: torch.Tensor, prompt: str, options: dict[str, str]
) -> tuple[dict[str, Any], np.ndarray]:
    """What OpenVINO says of a directory, and its logits ``[windows, length, vocabulary]``."""
    logits = folder / "logits.npy"
    request: dict[str, Any] = {"directory": str(folder / "openvino"), "ids": ids.tolist(), "logits": str(logits)}
    request |= {"prompt": prompt, "tokens": _TOKENS, "options": options}
    # this checkout's hf_quant is for this transformers, not for the environment's
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), str(_CHILD)]
    child = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, check=False, env=environment
    )
    if child.returncode:
        sys.exit(f"OpenVINO failed:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1]), np.load(logits)


def line_of(row: dict[str, Any]) -> str:
    """The row of the table."""
    weights = ", ".join(f"{count} × {kind}" for kind, count in row["weights"].items())
    exact, default = row["float32"], row["defaults"]
    greedy = ", ".join(f"{found} of {of}" for found, of in zip(row["same_tokens"], row["tokens"], strict=True))
    return (
        f"| {row['label']} | {row['bytes'] / 1e6:.0f} | {weights} | {row['perplexity']:.3f} "
        f"| {exact['perplexity']:.3f} | {default['perplexity']:.3f} "
        f"| {exact['kl']:.1g} | {default['kl']:.2g} | {default['top1']:.1%} | {greedy} |"
    )


if __name__ == "__main__":
    main()
