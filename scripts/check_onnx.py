"""ONNX files in onnxruntime: do they compute and generate what the checkpoint does?

    python scripts/check_onnx.py [--model DIR] [--optimum PYTHON] [--fill README.md] [--json FILE]

Each row quantizes the model, converts the checkpoint with ``hf-quant convert --to onnx`` and runs the directory with
``ORTModelForCausalLM``: logits of windows in one pass, and a greedy answer token by token through the cache. Where
onnxruntime rounds the inputs of layers to 8 bits, another row has the same file (int8) or checkpoint (int4) with inputs
as they are. Rows that ``--json`` holds from an earlier run are not measured again. ``--optimum`` is the Python of an
environment with optimum-onnx (by default one is made: it wants an older transformers than hf-quant).
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

_MARKS = ("<!-- table:onnx -->", "<!-- /table:onnx -->")
_CHILD = Path(__file__).parent / "onnx_child.py"
_PACKAGES = ("optimum-onnx[onnxruntime]==0.1.0", "onnxruntime==1.32.0", "transformers==4.57.6")
_CHAT = "What is the capital of France?"
_TEXT = "docs"
_TOKENS = 32
_HEAD = (
    "| checkpoint | MB | inputs of layers | perplexity hf-quant | onnxruntime | KL | same top token | largest Δ logit "
    "| same greedy tokens |"
)
_RULE = "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"


@dataclass(frozen=True)
class Case:
    """How the model is quantized and run.

    Attributes:
        label: of the row.
        options: of the config.
        rounded: inputs of layers are rounded to 8 bits: in the file for int4, by onnxruntime's own choice for int8.
    """

    label: str
    options: dict[str, Any]
    rounded: bool = False

    @property
    def key(self) -> str:
        """What tells the row from the others."""
        return f"{self.label}, {'rounded' if self.rounded else 'exact'}"


_EIGHT = {"bits": 8, "group_size": 64}
CASES = (
    Case("int4 sym g32", {"group_size": 32}),
    Case("int4 sym g32", {"group_size": 32}, rounded=True),
    Case("int4 asym g64", {"group_size": 64, "symmetric": False}),
    Case("int4 sym g64, int8 embedding and head", {"group_size": 64, "overrides": {"embed_tokens": {"bits": 8}}}),
    Case("int8 sym g64", _EIGHT),
    Case("int8 sym g64", _EIGHT, rounded=True),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the rows and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="float checkpoint (default: the demo's SmolLM2)")
    parser.add_argument("--optimum", type=Path, help="Python with optimum-onnx (default: one is made)")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "hf-quant" / "envs")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--method", default="search", help="how scales are chosen; it matters little here")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--fill", type=Path, help="put the table between the marks of this file")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    model = options.model or default_model()
    python = options.optimum or make_environment("optimum-onnx", _PACKAGES, options.envs)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = built_in_windows(tokenizer, options.windows, options.length, seed=0)[_TEXT].ids
    chat = [{"role": "user", "content": _CHAT}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    protocol = {
        "model": label_of(options.model),
        "windows": [options.windows, options.length],
        "method": options.method,
    }
    rows = recorded(options.json, protocol)
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if case.key not in rows:
                rows[case.key] = measure(case, model, python, ids, prompt, Path(folder), options.method)
                print(json.dumps(rows[case.key]), file=sys.stderr, flush=True)
                record(options.json, {**protocol, "rows": list(rows.values())})
    with torch.no_grad():
        plain = perplexity(np.stack([float_model(model)(row[None]).logits[0].numpy() for row in ids]), ids)
    found = [rows[case.key] for case in CASES]
    versions = found[0]["versions"]
    note = (
        f"{label_of(options.model)} (float32: perplexity {plain:.3f}), {options.windows} windows of {options.length} "
        f"held-out tokens; onnxruntime {versions['onnxruntime']} through optimum-onnx with transformers "
        f"{versions['transformers']}, the rest of the graph in float32. KL(hf-quant ‖ onnxruntime) in nats per token; "
        f"greedy tokens of {_TOKENS} that are `generate`'s on the dequantized weights, up to the first difference."
    )
    publish([_HEAD, _RULE, *(line_of(row) for row in found), "", note], options.markdown, options.fill, _MARKS)


def measure(
    case: Case, model: Path, python: Path, ids: torch.Tensor, prompt: list[int], folder: Path, method: str
) -> dict[str, Any]:
    """The figures of one row."""
    ours, answer = expected(case, model, ids, prompt, folder, method)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        directory = Path(made) / "onnx"
        convert(folder / case.label, directory, "onnx", activations="int8" if case.rounded else "float")
        said, theirs = run(python, directory, ids, prompt, folder, exact=not case.rounded)
        size = sum(file.stat().st_size for file in directory.glob("model.onnx*"))
    first, second = (functional.log_softmax(torch.from_numpy(logits), dim=-1) for logits in (ours, theirs))
    pairs = list(zip(answer, said["tokens"], strict=False))
    same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return {
        "key": case.key,
        "label": case.label,
        "rounded": case.rounded,
        "bytes": size,
        "perplexity": perplexity(ours, ids),
        "perplexity_onnxruntime": perplexity(theirs, ids),
        # a divergence is never below 0, its rounding may be
        "kl": max(0.0, float((first.double().exp() * (first.double() - second.double())).sum(-1).mean())),
        "top1": float((first.argmax(-1) == second.argmax(-1)).float().mean()),
        "logit_difference": float(np.abs(ours - theirs).max()),
        "same_tokens": same,
        "tokens": max(len(answer), len(said["tokens"])),
        "versions": said["versions"],
    }


def expected(
    case: Case, model: Path, ids: torch.Tensor, prompt: list[int], folder: Path, method: str
) -> tuple[np.ndarray, list[int]]:
    """Logits ``[windows, length, vocabulary]`` and greedy tokens of the checkpoint ``folder / case.label``.

    Both are kept beside it for the next row of that label, and the checkpoint is made for the first.
    """
    logits, tokens = folder / f"{case.label}.npy", folder / f"{case.label}.json"
    if not tokens.is_file():
        hf_quant.quantize(str(model), HfQuantConfig(method=method, **case.options), folder / case.label)
        # the reference kernel makes the float weight for every product; these are the same weights, made once
        reference = hf_quant.load(folder / case.label, kernel="reference", dtype=torch.float32).dequantize()
        given = torch.tensor([prompt])
        with torch.no_grad():
            np.save(logits, np.stack([reference(row[None]).logits[0].numpy() for row in ids]))
            answer = reference.generate(given, max_new_tokens=_TOKENS, do_sample=False)[0, len(prompt) :].tolist()
        tokens.write_text(json.dumps(answer), encoding="utf-8")
    return np.load(logits), json.loads(tokens.read_text(encoding="utf-8"))


def run(
    python: Path, directory: Path, ids: torch.Tensor, prompt: list[int], folder: Path, *, exact: bool
) -> tuple[dict[str, Any], np.ndarray]:
    """What onnxruntime says of a directory, and its logits ``[windows, length, vocabulary]``."""
    logits = folder / "logits.npy"
    request: dict[str, Any] = {
        "directory": str(directory),
        "ids": ids.tolist(),
        "logits": str(logits),
        "prompt": prompt,
    }
    request |= {"tokens": _TOKENS, "threads": torch.get_num_threads(), "exact": exact}
    # this checkout's hf_quant is for this transformers, not for the environment's
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), str(_CHILD)]
    child = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, check=False, env=environment
    )
    if child.returncode:
        sys.exit(f"onnxruntime failed on {directory.name}:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1]), np.load(logits)


def line_of(row: dict[str, Any]) -> str:
    """The row of the table."""
    return (
        f"| {row['label']} | {row['bytes'] / 1e6:.0f} | {'rounded to 8 bits' if row['rounded'] else 'float32'} "
        f"| {row['perplexity']:.3f} | {row['perplexity_onnxruntime']:.3f} | {row['kl']:.2g} | {row['top1']:.1%} "
        f"| {row['logit_difference']:.1g} | {row['same_tokens']} of {row['tokens']} |"
    )


if __name__ == "__main__":
    main()
