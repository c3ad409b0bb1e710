"""Stock checkpoints on our kernels: are the logits those of the stock loaders?

    python scripts/check_stock.py [--gptqmodel PYTHON] [--fill README.md] [--json FILE]

For every row, a small random model is quantized and packed by the format's own library, loaded by stock transformers
with that library (in a process without hf-quant), and loaded here, packed on our kernels. The table has the largest
difference of logits and the divergence between the two, and for comparison how far the logits of both are from those of
the same weights expanded to float32: what rounding in the dtype amounts to. GPTQ and AWQ need an environment with
gptqmodel and optimum (``--gptqmodel``: its Python; by default one is made).
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

import torch
from measuring import publish, record  # type: ignore[import-not-found]
from peer_environments import make_environment  # type: ignore[import-not-found]
from safetensors.torch import load_file
from stock_peers.child import IDS  # type: ignore[import-not-found]
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

import hf_quant
from hf_quant.nn.swap import quantized_modules

_MARKS = ("<!-- table:stock -->", "<!-- /table:stock -->")
_CHILD = Path(__file__).parent / "stock_peers" / "child.py"
_PACKAGES = ("transformers==5.23.0", "GPTQModel==7.6.0", "optimum==2.3.0")
_SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "intermediate_size": 512, "num_key_value_heads": 2},
    "qwen2": {**_SIZES, "intermediate_size": 512, "num_key_value_heads": 2},  # biases on q, k and v
    "opt": {**_SIZES, "ffn_dim": 512, "word_embed_proj_dim": 256},  # biases everywhere
    # Conv1D, which stock bitsandbytes loads, and stock GPTQ does not at the moment
    "gpt2": {"vocab_size": 512, "n_embd": 256, "n_layer": 2, "n_head": 4},
}


@dataclass(frozen=True)
class Case:
    """One row: who packs it, how, in which models, and the dtype that both compute in."""

    method: str
    label: str
    dtype: str
    options: dict[str, Any]
    models: tuple[str, ...] = ("llama", "qwen2", "opt")


_TORCH = {"backend": "torch"}  # GPTQModel's plain kernel: what it picks itself rounds weights and sums to bfloat16
_V2 = {"sym": False, "format": "gptq_v2"}
CASES = (
    *(
        Case(
            "compressed-tensors",
            f"{storage} int{bits} {'sym' if sym else 'asym'} {name}",
            dtype,
            {"format": storage, "bits": bits, "sym": sym, "group_size": group},
        )
        for storage, bits, sym, group, name, dtype in (
            ("pack-quantized", 4, True, 128, "g128", "bfloat16"),
            ("pack-quantized", 4, True, 128, "g128", "float32"),
            ("pack-quantized", 4, False, 32, "g32", "float32"),
            ("pack-quantized", 8, True, -1, "per-channel", "float32"),
            ("int-quantized", 8, True, -1, "per-channel", "float32"),
            ("naive-quantized", 8, False, 64, "g64", "float32"),
        )
    ),
    Case("gptq", "v1 int4 sym g128", "float16", {**_TORCH, "bits": 4, "group_size": 128}),
    Case("gptq", "v1 int4 sym g32, act-order", "float16", {**_TORCH, "bits": 4, "group_size": 32, "act_order": True}),
    Case("gptq", "v2 int4 asym g64", "float16", {**_TORCH, **_V2, "bits": 4, "group_size": 64}),
    Case(
        "gptq",
        "v2 int4 asym g64, act-order",
        "float16",
        {**_TORCH, **_V2, "bits": 4, "group_size": 64, "act_order": True},
    ),
    Case("gptq", "v1 int8 sym per-channel", "float16", {**_TORCH, "bits": 8, "group_size": -1}),
    Case("awq", "gemm int4 g64", "float16", {"backend": "torch_awq", "group_size": 64}),
    Case("awq", "gemm int4 g128", "float16", {"backend": "torch_awq", "group_size": 128}),
    Case("gptq", "v1 int4 sym g128, stock's fastest kernel", "float16", {"bits": 4, "group_size": 128}),
    Case("awq", "gemm int4 g128, stock's fastest kernel", "float16", {"group_size": 128}),
    Case(
        "bitsandbytes",
        "nf4, double quantization",
        "bfloat16",
        {"quant_type": "nf4", "double_quant": True},
        tuple(MODELS),
    ),
    Case("bitsandbytes", "fp4", "bfloat16", {"quant_type": "fp4", "double_quant": False}),
)


def make_models(folder: Path) -> dict[str, Path]:
    """Random float32 checkpoints with logits that are worth comparing."""
    made = {}
    for name, settings in MODELS.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, initializer_range=0.08, bos_token_id=1, eos_token_id=2, **settings)
        made[name] = folder / name
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(made[name])
    return made


def run_child(python: Path, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Do jobs with the stock libraries."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(python), str(_CHILD), str(file)], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{python} {_CHILD.name} failed: {done.stderr.strip().splitlines()[-1:]}")


def compare(case: Case, model: str, out: Path) -> dict[str, Any]:
    """One row from what the child left and our own run."""
    row: dict[str, Any] = {"method": case.method, "label": case.label, "model": model, "dtype": case.dtype}
    stock_file = out.parent / f"{out.name}.logits.safetensors"
    if not stock_file.is_file():
        error = out.parent / f"{out.name}.error.txt"
        lines = error.read_text(encoding="utf-8").strip().splitlines() if error.is_file() else ["it was not run"]
        return {**row, "error": lines[-1]}
    stock = load_file(stock_file)["logits"]
    found = hf_quant.load(out, dtype=case.dtype).eval()
    with torch.no_grad():
        ours = found(IDS).logits.float()
        layers = [layer for _, layer in quantized_modules(found)]
        kernels = sorted({str(layer.kernel_name) for layer in layers})
        expanded = found.dequantize(torch.float32).float()(IDS).logits
    return {
        **row,
        "layers": len(layers),
        "kernels": kernels,
        "largest_logit": float(stock.abs().max()),
        "difference": float((ours - stock).abs().max()),
        "kl": _kl(stock, ours),
        "stock_rounding": float((stock - expanded).abs().max()),
        "our_rounding": float((ours - expanded).abs().max()),
        "kl_stock_rounding": _kl(expanded, stock),
    }


def _kl(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over the tokens of KL(one || other), in nats."""
    a, b = (functional.log_softmax(x.double(), -1) for x in (one, other))
    return float((a.exp() * (a - b)).sum(-1).mean())


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: one line per kind of checkpoint, with the largest figures over its models."""
    lines = [
        "| checkpoint | models | dtype | ours − stock | KL | stock − float32 | ours − float32 |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["label"], row["dtype"]), []).append(row)
    for (method, label, dtype), group in groups.items():
        done = [row for row in group if "error" not in row]
        if done:
            figures = (f"{max(row[key] for row in done):.2g}" for key in _FIGURES)
            names = ", ".join(row["model"] for row in done)
            lines.append(f"| {method} {label} | {names} | {dtype} | " + " | ".join(figures) + " |")
        lines += [
            f"| {method} {label} | {row['model']} | {dtype} | the stock loader fails: {row['error']} | | | |"
            for row in group
            if "error" in row
        ]
    lines += ["", _CAPTION]
    return lines


_FIGURES = ("difference", "kl", "stock_rounding", "our_rounding")
_CAPTION = (
    "Small random models, 2 × 64 tokens; each checkpoint packed by the format's own library (compressed-tensors 0.20, "
    "GPTQModel 7.6, bitsandbytes 0.50), loaded by stock transformers with it, and by hf-quant. Largest differences of "
    "logits (which go up to 6) and KL(stock ‖ ours) in nats per token over the models; float32: the same packed "
    "weights expanded and computed in float32. With zero points and for int-quantized, stock transformers needs "
    "`dequantize=True`, which rounds the weights to the scales' bfloat16: that is its distance there."
)


def main(arguments: argparse.Namespace) -> None:
    """Write, load twice, compare, print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = make_models(folder)
        pairs = [(case, model) for case in CASES for model in case.models]
        jobs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for i, (case, model) in enumerate(pairs):
            job = {"method": case.method, "options": case.options, "dtype": case.dtype}
            jobs[case.method in ("gptq", "awq")].append(
                {**job, "source": str(sources[model]), "out": str(folder / str(i))}
            )
        run_child(Path(sys.executable), jobs[False], folder)
        python = arguments.gptqmodel or make_environment("gptqmodel-stock", _PACKAGES, arguments.environments)
        run_child(python, jobs[True], folder)
        rows = [compare(case, model, folder / str(i)) for i, (case, model) in enumerate(pairs)]
    record(arguments.json, {"rows": rows})
    publish(table(rows), None, arguments.fill, _MARKS)
    if any("error" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gptqmodel", type=Path, help="Python of an environment with gptqmodel and optimum")
    parser.add_argument("--environments", type=Path, default=Path("peer-environments"), help="where one is made")
    parser.add_argument("--fill", type=Path, help=f"write the table between the {_MARKS[0]} marks of this")
    parser.add_argument("--json", type=Path, help="write the figures here")
    main(parser.parse_args())
