"""GGUF files in llama.cpp: do they compute what the checkpoint computes?

    python scripts/check_gguf.py [--model DIR] [--llama-cpp PYTHON] [--fill README.md] [--json FILE]

Each row quantizes the model, converts the checkpoint with ``hf-quant convert --to gguf`` and runs the file in
llama-cpp-python. The last column runs a second file that holds the same weights expanded to float32, so that llama.cpp
computes in float32, too: what is left there is the order of summation, and nothing of names, row orders, rotary
embeddings or norms can be wrong. With the packed file, llama.cpp rounds the activations to 8 bits. The tokens of a text
have to be those of the model's tokenizer. ``--llama-cpp`` is the Python of an environment with llama-cpp-python (by
default one is made, which compiles it).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import (  # type: ignore[import-not-found]
    built_in_windows,
    default_model,
    float_model,
    label_of,
    publish,
    record,
)
from peer_environments import LLAMA_CPP, make_environment  # type: ignore[import-not-found]
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.convert import convert
from hf_quant.evaluation.text import load_text
from hf_quant.export import gguf_file
from hf_quant.nn.swap import put_float

_MARKS = ("<!-- table:gguf -->", "<!-- /table:gguf -->")
_CHILD = Path(__file__).parent / "gguf_child.py"
_CHAT = "What is the capital of France?"
_TEXT = "docs"
_HEAD = (
    "| checkpoint | file | MB | rounded blocks | perplexity hf-quant | llama.cpp | KL | same top token | "
    "largest Δ logit, float32 weights |"
)
_RULE = "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"


@dataclass(frozen=True)
class Case:
    """One row: how the model is quantized, and whether scales have to be rounded."""

    label: str
    options: dict[str, Any]
    round_scales: bool = False


CASES = (
    Case("int4 sym g32", {"group_size": 32}),
    Case("int4 sym g64", {"group_size": 64}),
    Case("int4 asym g32", {"group_size": 32, "symmetric": False}, round_scales=True),
    Case("int8 sym g64", {"bits": 8, "group_size": 64}),
    Case("int4 sym g32, int8 embedding and head", {"group_size": 32, "overrides": {"embed_tokens": {"bits": 8}}}),
)

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # attention that looks somewhere, so that a wrong position shows
    "max_position_embeddings": 512,
}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
_LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with Llama 3's frequencies": ("llama", {"rope_parameters": _LLAMA3}),
    "llama with linear frequencies": ("llama", {"rope_parameters": _LINEAR, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "smollm3": ("smollm3", {}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the rows and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="float checkpoint (default: the demo's SmolLM2)")
    parser.add_argument("--llama-cpp", type=Path, help="Python with llama-cpp-python (default: one is made)")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "hf-quant" / "envs")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--method", default="search", help="how scales are chosen; it matters little here")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--fill", type=Path, help="put the table between the marks of this file")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    model = options.model or default_model()
    python = options.llama_cpp or make_environment("llama-cpp-python", (LLAMA_CPP,), options.envs)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = built_in_windows(tokenizer, options.windows, options.length, seed=0)[_TEXT].ids
    text = load_text(_TEXT).content[:20_000]
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        plain = perplexity(np.stack([float_model(model)(row[None]).logits[0].numpy() for row in ids]), ids)
    different = {
        name: architecture(kind, settings, model, python, ids[:2, :128])
        for name, (kind, settings) in ARCHITECTURES.items()
    }
    print(json.dumps(different), file=sys.stderr, flush=True)
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(case, model, python, ids, text, expected, Path(folder), options.method)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    record(
        options.json,
        {"model": label_of(options.model), "float_perplexity": plain, "architectures": different, "rows": rows},
    )
    notes = [note(options, plain, len(expected), rows[0]["version"]), architectures_note(different)]
    lines = [_HEAD, _RULE, *(line_of(row) for row in rows), "", *notes]
    publish(lines, options.markdown, options.fill, _MARKS)


def measure(
    case: Case,
    model: Path,
    python: Path,
    ids: torch.Tensor,
    text: str,
    tokens: list[int],
    folder: Path,
    method: str,
) -> dict[str, Any]:
    """The figures of one row."""
    hf_quant.quantize(str(model), HfQuantConfig(method=method, **case.options), folder / "quantized")
    done = convert(folder / "quantized", folder / "file", "gguf", round_scales=case.round_scales)
    (file,) = (folder / "file").glob("*.gguf")
    said, theirs = run(python, file, ids, folder, text, _CHAT)
    if said["tokens"] != tokens:
        sys.exit(f"{case.label}: llama.cpp cuts the text into other tokens than the tokenizer of {model}")
    ours_model = hf_quant.load(folder / "quantized", kernel="reference", dtype=torch.float32)
    with torch.no_grad():
        ours = np.stack([ours_model(row[None]).logits[0].numpy() for row in ids])
    put_float(ours_model, torch.float32)
    expanded = gguf_file.write(ours_model, folder / "quantized", folder, "expanded").file
    _, plain = run(python, expanded, ids, folder)
    first, second = (functional.log_softmax(torch.from_numpy(a), dim=-1) for a in (ours, theirs))
    return {
        "label": case.label,
        "file": file.stem.rpartition("-")[2],
        "bytes": file.stat().st_size,
        "exact": done.exact,
        "notes": done.notes[1:],
        "perplexity": perplexity(ours, ids),
        "perplexity_llama_cpp": perplexity(theirs, ids),
        "kl": float((first.exp() * (first - second)).sum(-1).mean()),
        "top1": float((first.argmax(-1) == second.argmax(-1)).float().mean()),
        "logit_difference": float(np.abs(plain - ours).max()),
        "answer": said["answer"],
        "version": said["version"],
    }


def architecture(
    kind: str, settings: dict[str, Any], tokenizer: Path, python: Path, ids: torch.Tensor
) -> dict[str, float]:
    """A small random model of one type: the largest difference of logits (float32 weights), and the largest logit."""
    made = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(made)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_SIZES, **special, **settings))
    model = model.float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        file = gguf_file.write(model, Path(folder), Path(folder), "random").file
        _, theirs = run(python, file, ids, Path(folder))
    with torch.no_grad():
        ours = model(ids).logits.numpy()
    return {"difference": float(np.abs(ours - theirs).max()), "largest": float(np.abs(ours).max())}


def run(
    python: Path, file: Path, ids: torch.Tensor, folder: Path, text: str = "", chat: str = ""
) -> tuple[dict[str, Any], np.ndarray]:
    """What llama.cpp says of a file, and its logits ``[windows, length, vocabulary]``."""
    logits = folder / "logits.npy"
    request: dict[str, Any] = {"file": str(file), "ids": ids.tolist(), "logits": str(logits), "text": text}
    request |= {"chat": chat, "threads": torch.get_num_threads()}
    command = [str(python), str(_CHILD)]
    child = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if child.returncode:
        sys.exit(f"llama.cpp failed on {file.name}:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1]), np.load(logits)


def perplexity(logits: np.ndarray, ids: torch.Tensor) -> float:
    """Of every token after the first of its window."""
    scores = torch.from_numpy(logits)[:, :-1].flatten(0, 1)
    return float(functional.cross_entropy(scores, ids[:, 1:].flatten()).exp())


def line_of(row: dict[str, Any]) -> str:
    """The row of the table."""
    rounded = "none" if row["exact"] else row["notes"][0].partition(" blocks")[0]
    return (
        f"| {row['label']} | {row['file']} | {row['bytes'] / 1e6:.0f} | {rounded} | {row['perplexity']:.3f} "
        f"| {row['perplexity_llama_cpp']:.3f} | {row['kl']:.2g} | {row['top1']:.1%} | {row['logit_difference']:.1g} |"
    )


def note(options: argparse.Namespace, plain: float, tokens: int, version: str) -> str:
    """What was measured on what."""
    return (
        f"{label_of(options.model)} (float32: perplexity {plain:.3f}), {options.windows} windows of {options.length} "
        f"held-out tokens; llama-cpp-python {version}, keys and values in float32. KL(hf-quant ‖ llama.cpp) in nats "
        f"per token. {tokens:,} tokens of a text are the same in both tokenizers, in every row."
    )


def architectures_note(different: dict[str, dict[str, float]]) -> str:
    """What was found on the random models, in a sentence."""
    largest = max(found["difference"] / found["largest"] for found in different.values())
    return (
        f"Small random models in float32 ({', '.join(different)}): the logits of llama.cpp are those of transformers "
        f"to {largest:.1g} of the largest one."
    )


if __name__ == "__main__":
    main()
