"""GPTQ and AWQ checkpoints written from the description of their layouts, and the float model of the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

IDS = torch.arange(3, 27).view(2, 12)
SIZES = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2},
    "qwen2": {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2},  # biases on q, k and v
    "opt": {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
CASES: dict[str, dict[str, Any]] = {
    "gptq": {**GPTQ, "checkpoint_format": "gptq"},
    "gptq-act-order": {**GPTQ, "desc_act": True},  # no format: version 1
    "gptq-v2-asym": {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
    "gptq-asym-act-order": {**GPTQ, "sym": False, "desc_act": True, "group_size": 16},
    "gptq-int8-channel": {**GPTQ, "bits": 8, "group_size": -1},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
}


def fields(codes: torch.Tensor, bits: int, places: list[int]) -> torch.Tensor:
    """int32 words along dim 0: field i of a word takes row ``places[i]`` of its ``len(places)`` rows."""
    rows = codes.to(torch.int64).view(-1, len(places), *codes.shape[1:])
    words = sum(rows[:, place] << (bits * i) for i, place in enumerate(places))
    assert isinstance(words, torch.Tensor)
    return (words & 0xFFFFFFFF).to(torch.int32)


def pack(weight: torch.Tensor, config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The stored tensors of a weight ``[out, in]`` rounded to nearest, and the float32 weight that they stand for."""
    bits, columns = config["bits"], weight.shape[1]
    group = columns if config["group_size"] == -1 else config["group_size"]
    index = torch.arange(columns) // group
    if config.get("desc_act"):
        index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    scales, zeros = [], []
    for g in range(columns // group):
        part, top = weight[:, index == g], (1 << bits) - 1
        if config.get("sym"):
            scales.append(part.abs().amax(1) / (top / 2))
            zeros.append(torch.full_like(scales[-1], (top + 1) / 2))
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales.append((high - low) / top)
            zeros.append((-low / scales[-1]).round().clamp(0, top))
    scale, zero = torch.stack(scales).half(), torch.stack(zeros)  # [groups, out]
    codes = ((weight.t() / scale.float()[index]).round() + zero[index]).clamp(0, (1 << bits) - 1)  # [in, out]
    value = (codes - zero[index]) * scale.float()[index]
    per_word = 32 // bits
    if config["quant_method"] == "awq":
        places = [0, 2, 4, 6, 1, 3, 5, 7]
        packed = {"qweight": fields(codes.t(), 4, places).t(), "qzeros": fields(zero.t(), 4, places).t()}
        return {**packed, "scales": scale}, value.t()
    places = list(range(per_word))
    stored_zero = fields(zero.t(), bits, places).t()
    if config.get("checkpoint_format", "gptq") == "gptq":
        ones = sum(1 << (bits * i) for i in range(per_word))
        stored_zero = ((stored_zero.to(torch.int64) - ones) & 0xFFFFFFFF).to(torch.int32)
    packed = {"qweight": fields(codes, bits, places), "qzeros": stored_zero, "scales": scale}
    return {**packed, "g_idx": index.to(torch.int32)}, value.t()


def write(out: Path, architecture: str, config: dict[str, Any]) -> Path:
    """A checkpoint in ``out``, and the float model of the same weights in ``out/../float``."""
    torch.manual_seed(1)
    settings = AutoConfig.for_model(architecture, initializer_range=0.1, **MODELS[architecture])
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.half().float()  # everything in float16 numbers
    state = model.state_dict()
    if settings.tie_word_embeddings:
        del state["lm_head.weight"]
    stored = {key: tensor.half() for key, tensor in state.items()}
    for name, module in model.named_modules():
        if any(part.isdecimal() for part in name.split(".")) and isinstance(module, (nn.Linear, Conv1D)):
            transposed = isinstance(module, Conv1D)
            weight = module.weight.data.t() if transposed else module.weight.data
            packed, value = pack(weight.contiguous(), config)
            del stored[f"{name}.weight"]
            stored |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in packed.items()}
            module.weight.data = value.t().contiguous() if transposed else value.contiguous()
    out.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, out / "model.safetensors", {"format": "pt"})
    described = settings.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": "float16",
        "quantization_config": config,
    }
    (out / "config.json").write_text(json.dumps(described))
    model.save_pretrained(out.parent / "float")
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def load(path: Path, **kwargs: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model.eval()
