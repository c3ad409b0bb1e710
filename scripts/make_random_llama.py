"""Write a Llama-shaped bfloat16 checkpoint with random weights (1.24 billion by default), one shard at a time.

usage: python scripts/make_random_llama.py OUT_DIR [--tokenizer DIR] [--layers N] [--hidden N] ...

For measuring memory and time where no large model is at hand; it says nothing about accuracy. At most one shard is in
memory (about 400 MB). The weights are normal with the deviation of a trained model, so that searches do real work.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD_BYTES = 400 * 10**6
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def shapes(arguments: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the model; a vector is a norm."""
    hidden, inner = arguments.hidden, arguments.intermediate
    head = hidden // arguments.heads
    yield "model.embed_tokens.weight", (arguments.vocabulary, hidden)
    for layer in range(arguments.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (arguments.kv_heads * head, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (arguments.kv_heads * head, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)


def shards(arguments: argparse.Namespace) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Tensors in groups of at most SHARD_BYTES (a larger tensor is alone)."""
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    held = 0
    for name, shape in shapes(arguments):
        size = 2 * torch.Size(shape).numel()
        if groups[-1] and held + size > SHARD_BYTES:
            groups.append([])
            held = 0
        groups[-1].append((name, shape))
        held += size
    return groups


def write(arguments: argparse.Namespace) -> int:
    """Write the checkpoint; returns its number of parameters."""
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(arguments.seed)
    groups = shards(arguments)
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for name, shape in group:
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                tensors[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            weight_map[name] = file
            total += tensors[name].numel()
        save_file(tensors, out / file, metadata={"format": "pt"})
        print(f"{number}/{len(groups)}  {file}", flush=True)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": arguments.vocabulary,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "head_dim": arguments.hidden // arguments.heads,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    if arguments.tokenizer:
        for name in TOKENIZER_FILES:
            if (arguments.tokenizer / name).is_file():
                shutil.copyfile(arguments.tokenizer / name, out / name)
    return total


def main() -> None:
    """Parse the arguments and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="borrow the tokenizer files of this directory")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    total = write(arguments)
    print(f"{total / 1e9:.3f} billion parameters, {2 * total / 1e9:.2f} GB of bfloat16 in {arguments.out}")


if __name__ == "__main__":
    main()
