"""Experts through the plugin: names on disk, fused and merged checkpoints, partly quantized ones, the way back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.calibration import CalibrationData
from hf_quant.errors import CheckpointError, WeightError
from hf_quant.nn.splitting import split_modules
from hf_quant.nn.swap import quantized_modules

IDS = torch.arange(3, 27).view(2, 12)
SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAST = {"method": "absmax"}


def _model(kind: str = "mixtral", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0, 0.1)
    return model


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


def _keys(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w1"),
        ("gpt_oss", "model.layers.0.mlp.experts.3.gate_proj"),
    ],
)
def test_names_on_disk_are_those_that_servers_read(kind: str, prefix: str, tmp_path: Path) -> None:
    hf_quant.quantize(_model(kind), HfQuantConfig(**FAST), tmp_path / "q")
    expected = {f"{prefix}.{suffix}" for suffix in ("weight_packed", "weight_scale", "weight_shape")}
    keys = _keys(tmp_path / "q")
    assert expected <= keys and not any("gate_up_proj" in key for key in keys)
    assert (f"{prefix}.bias" in keys) == (kind == "gpt_oss")


@pytest.mark.parametrize("recipe", [{"bits": 8}, {"symmetric": False}, {"grid": "nf4"}], ids=str)
def test_every_grid_comes_back(recipe: dict[str, Any], tmp_path: Path) -> None:
    model = hf_quant.quantize(_model("gpt_oss"), HfQuantConfig(**FAST, **recipe), tmp_path / "q")
    again = hf_quant.load(tmp_path / "q")
    assert torch.equal(_logits(again), _logits(model))
    assert dict(quantized_modules(again)).keys() == dict(quantized_modules(model)).keys()


def test_some_experts_in_float(tmp_path: Path) -> None:
    """Their tensors are stored one by one, too; the other layers' experts stay apart."""
    _model().save_pretrained(tmp_path / "f")
    config = HfQuantConfig(**FAST, skip=["re:.*layers.0.*experts.*", "re:.*experts.2.w1"])
    model = hf_quant.quantize(tmp_path / "f", config, tmp_path / "q")
    names = set(dict(quantized_modules(model)))
    assert "model.layers.1.mlp.experts.0.w1" in names and "model.layers.1.mlp.experts.2.w1" not in names
    assert not any("layers.0.mlp.experts" in name for name in names)
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in _keys(tmp_path / "q")
    assert torch.equal(_logits(hf_quant.load(tmp_path / "q")), _logits(model))


def test_some_experts_in_float_in_memory(tmp_path: Path) -> None:
    """They have memory of their own: the fused tensor goes, and what is left can be saved."""
    model = hf_quant.quantize(_model("gpt_oss"), HfQuantConfig(**FAST, skip=["re:.*experts.2.*"]), tmp_path / "q")
    assert torch.equal(_logits(hf_quant.load(tmp_path / "q")), _logits(model))
    left = model.get_submodule("model.layers.0.mlp.experts.2.up_proj").weight
    assert left.untyped_storage().nbytes() == left.numel() * left.element_size()


def test_all_experts_in_float_stay_fused(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path / "f")
    model = hf_quant.quantize(tmp_path / "f", HfQuantConfig(**FAST, skip=["re:.*experts.*"]), tmp_path / "q")
    again = hf_quant.load(tmp_path / "q")
    assert not split_modules(model) and not split_modules(again)
    assert torch.equal(_logits(again), _logits(model))


def test_a_merged_checkpoint_of_a_model_that_has_them_apart(tmp_path: Path) -> None:
    """Fused tensors in the files, where the architecture's own files have them one by one."""
    model = _model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "apart")
    (tmp_path / "merged").mkdir()
    from safetensors.torch import save_file

    save_file(
        {name: value.clone() for name, value in state.items()},
        tmp_path / "merged" / "model.safetensors",
        {"format": "pt"},
    )
    model.config.save_pretrained(tmp_path / "merged")
    found = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, quantization_config=HfQuantConfig(**FAST))
        for name in ("apart", "merged")
    ]
    assert torch.equal(_logits(found[0]), _logits(found[1]))


def test_the_way_back_is_the_float_checkpoint(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path / "f")
    model = hf_quant.quantize(tmp_path / "f", HfQuantConfig(**FAST), tmp_path / "q")
    packed = _logits(model)
    plain = hf_quant.load(tmp_path / "q").dequantize()
    assert not split_modules(plain)
    torch.testing.assert_close(_logits(plain), packed, rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path / "back")
    assert _keys(tmp_path / "back") == _keys(tmp_path / "f")
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "back")), _logits(plain))


def test_a_bad_expert_is_named_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    model = _model()
    exact = _logits(model)
    weight = model.model.layers[1].mlp.experts.down_proj
    kept = weight.data[2, 0, 0].clone()
    weight.data[2, 0, 0] = float("nan")
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.experts\.2\.w2"):
        hf_quant.quantize(model, HfQuantConfig(**FAST))
    assert not split_modules(model)
    model.save_pretrained(tmp_path / "f")
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.experts\.2\.w2"):
        hf_quant.quantize(tmp_path / "f", HfQuantConfig(**FAST))
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = kept
    assert torch.equal(_logits(model), exact)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.experts\.1\.w3"):
        hf_quant.quantize(tmp_path, HfQuantConfig(**FAST))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_calibrated_from_files_and_from_memory(kind: str, tmp_path: Path, caplog) -> None:
    """An expert that no token is routed to is named, and quantized without data."""
    model = _model(kind)
    router = next(module for name, module in model.named_modules() if name.endswith((".gate", ".router")))
    router.weight.data[3] = 0
    if kind == "gpt_oss":
        router.bias.data[3] = -1e3
    else:
        model.model.layers[0].post_attention_layernorm.weight.data.zero_()  # equal scores: the first two are taken
    model.save_pretrained(tmp_path / "f")
    rows = torch.randint(3, 384, (8, 2, 32), generator=torch.Generator().manual_seed(1))
    data = CalibrationData.make([{"input_ids": row} for row in rows], "tokens", 0)
    config = HfQuantConfig(method="gptq")
    with caplog.at_level(logging.WARNING, logger="hf_quant"):
        one = hf_quant.quantize(tmp_path / "f", config, tmp_path / "q", calibration=data)
    idle = f"model.layers.0.mlp.experts.3.{'w1' if kind == 'mixtral' else 'gate_proj'}"
    assert idle in caplog.text and "quantized without data" in caplog.text
    result = next(row for row in one.hf_quantizer.results if row["name"] == idle)
    assert result["method"] == "search" and "only 0 calibration tokens" in result["note"]
    two = hf_quant.quantize(AutoModelForCausalLM.from_pretrained(tmp_path / "f"), config, calibration=data)
    free = hf_quant.quantize(tmp_path / "f", HfQuantConfig())
    exact = _logits(model)
    assert torch.equal(_logits(one), _logits(two)) and torch.equal(_logits(one), _logits(hf_quant.load(tmp_path / "q")))
    assert (_logits(one) - exact).norm() < (_logits(free) - exact).norm()


def test_experts_do_not_compile_and_generate_says_so() -> None:
    model = hf_quant.quantize(_model(), HfQuantConfig(**FAST))
    assert not model.hf_quantizer.is_compileable
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 14)


def test_a_model_that_writes_into_what_a_layer_gave() -> None:
    """Llama 4 adds its routed experts to the shared one's output in place; with gradients, too."""
    model = hf_quant.quantize(
        _model("llama4_text", num_experts_per_tok=1, intermediate_size_mlp=64), HfQuantConfig(**FAST)
    )
    with torch.enable_grad():
        logits = model(IDS).logits
        logits.square().sum().backward()
    assert torch.equal(logits, _logits(model))
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
