"""ModelOpt's layout: codes and scales read back as its readers do are ours; what it cannot hold is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.checkpoint import verify_manifest
from hf_quant.checkpoint.contents import foreign_files
from hf_quant.convert import convert
from hf_quant.errors import FormatError
from hf_quant.export.modelopt_file import encode, published_config
from hf_quant.grids import Scheme
from hf_quant.nn.swap import quantized_modules
from hf_quant.tensor import QuantizedTensor

SIZES = {"vocab_size": 384, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
EIGHT = {"bits": 8, "group_size": -1}


def _quantized(path: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    torch.manual_seed(0)
    settings = {} if kind == "gpt2" else SIZES
    config = (
        AutoConfig.for_model(kind, **settings)
        if settings
        else AutoConfig.for_model(kind, vocab_size=384, n_embd=64, n_layer=1, n_head=2, n_positions=64)
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    hf_quant.quantize(model, HfQuantConfig(method="absmax", **options), path)
    return path


def _values(tensors: dict[str, torch.Tensor], name: str, group: int | None) -> torch.Tensor:
    """The weight, written with loops over what the layout says; ``group`` None for 8 bits."""
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"].float()
    if group is None:
        assert weight.dtype == torch.int8 and scale.ndim == 1
        return weight.float() * scale[:, None]
    assert weight.dtype == torch.uint8 and bool((tensors[f"{name}.pre_quant_scale"] == 1).all())
    rows = []
    for pair in weight.to(torch.int16):
        rows.extend([pair & 15, pair >> 4])
    signed = torch.stack([torch.where(row > 7, row - 16, row) for row in rows]).float()
    return signed * scale.repeat_interleave(group, dim=1)


@pytest.mark.parametrize(
    ("options", "algorithm", "group"),
    [
        ({"group_size": 64}, {"quant_algo": "W4A16_AWQ", "group_size": 64}, 64),
        ({"group_size": 128, "skip": ["re:.*layers.1.*"]}, {"quant_algo": "W4A16_AWQ", "group_size": 128}, 128),
        (EIGHT, {"quant_algo": "W8A16"}, None),
    ],
)
def test_every_weight_is_the_checkpoints(options, algorithm, group, tmp_path) -> None:
    quantized = _quantized(tmp_path / "quantized", **options)
    done = convert(quantized, tmp_path / "out", "modelopt")
    assert done.exact and "never run" in done.notes[0]
    model = hf_quant.load(quantized, kernel="reference")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    layers = dict(quantized_modules(model))
    for name, layer in layers.items():
        assert torch.equal(_values(tensors, name, group), layer.dequantize())
    plain = {name for name in tensors if not any(name.startswith(f"{layer}.") for layer in layers)}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= plain
    assert all(torch.equal(tensors[name], model.state_dict()[name]) for name in plain)
    config = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    body = config["quantization"]
    assert config["producer"]["name"] == "modelopt" and algorithm.items() <= body.items()
    floats = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(body["exclude_modules"]) == floats and "lm_head" in floats
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored == published_config(config) and stored["quant_method"] == "modelopt"
    assert verify_manifest(tmp_path / "out").ok and foreign_files(tmp_path / "out") == []


def test_several_schemes_are_mixed_precision(tmp_path) -> None:
    quantized = _quantized(tmp_path / "quantized", group_size=64, overrides={"down_proj": EIGHT})
    convert(quantized, tmp_path / "out", "modelopt")
    body = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert body["quant_algo"] == "MIXED_PRECISION" and len(body["quantized_layers"]) == 14
    assert body["quantized_layers"]["model.layers.0.mlp.down_proj"] == {"quant_algo": "W8A16"}
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(len(group["targets"]) for group in groups.values()) == [2, 12]


def test_a_tied_head_is_written_once(tmp_path) -> None:
    config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    hf_quant.quantize(model, HfQuantConfig(method="absmax", group_size=64), tmp_path / "quantized")
    convert(tmp_path / "quantized", tmp_path / "out", "modelopt")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors and "lm_head.weight" not in tensors


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("llama", {"group_size": 32}, r"q_proj cannot be converted to ModelOpt's layout: .*not 32"),
        ("llama", {"group_size": 64, "symmetric": False}, "no zero points"),
        ("llama", {"bits": 8, "group_size": 64}, "one scale per output, not groups of 64"),
        ("llama", {"grid": "nf4"}, "it has no nf4"),
        ("llama", {"group_size": 64, "overrides": {"embed_tokens": {"bits": 8}}}, "embed_tokens cannot be converted"),
        ("llama", {"group_size": 64, "overrides": {"up_proj": EIGHT}}, "gate_proj and .*up_proj are stored in diff"),
        ("llama", {"group_size": 64, "skip": ["re:.*k_proj"]}, "q_proj and .*k_proj are stored in different ways"),
        ("gpt2", {"grid": "nf4"}, "Conv1D"),
        ("mixtral", {"group_size": 64}, "experts cannot be converted"),
    ],
)
def test_what_cannot_be_expressed_is_refused(kind, options, match, tmp_path) -> None:
    quantized = _quantized(tmp_path / "quantized", kind, **options)
    with pytest.raises(FormatError, match=match):
        convert(quantized, tmp_path / "out", "modelopt")
    assert not (tmp_path / "out").exists()


def test_scales_must_be_numbers_of_the_models_dtype() -> None:
    codes = torch.zeros(2, 64, dtype=torch.uint8)
    tensor = QuantizedTensor.from_codes(codes, torch.full((2, 1), 0.1), None, Scheme(group_size=64))
    with pytest.raises(FormatError, match="layer cannot be converted: its scales are no bfloat16 numbers"):
        encode(tensor, torch.bfloat16, "layer")
    assert encode(tensor, torch.float32)["weight_scale"].dtype == torch.float32
