"""Checkpoints that others packed run on our runtime: GPTQ, AWQ and int-quantized files, act-order, experts."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_files import CASES, IDS, MODELS, load, logits, pack
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

import hf_quant
from hf_quant.errors import FormatError
from hf_quant.nn.fused import describe_fused
from hf_quant.nn.linear import QuantLinear
from hf_quant.nn.ordered import OrderedQuantLinear
from hf_quant.nn.swap import quantized_modules

PAIRS = [(case, "llama") for case in CASES]
PAIRS += [(case, a) for case in ("gptq", "gptq-act-order", "awq") for a in ("qwen2", "opt")]
PAIRS += [("gptq", "gpt2"), ("gptq-act-order", "gpt2")]


@pytest.mark.parametrize(("case", "architecture"), PAIRS, ids=lambda value: value)
def test_the_logits_are_those_of_the_same_weights_in_float(case, architecture, stored, tmp_path) -> None:
    path = stored(case, architecture)
    expected = logits(AutoModelForCausalLM.from_pretrained(path.parent / "float"))
    model = load(path, dtype=torch.float32)
    layers = dict(quantized_modules(model))
    assert len(layers) == {"opt": 12, "gpt2": 8}.get(architecture, 14)
    assert all(isinstance(layer, OrderedQuantLinear) == CASES[case].get("desc_act", False) for layer in layers.values())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    half = logits(load(path))
    torch.testing.assert_close(half, expected, rtol=0, atol=0.01 * float(expected.abs().max()))

    model.save_pretrained(tmp_path / "again")
    saved, original = load_file(tmp_path / "again" / "model.safetensors"), load_file(path / "model.safetensors")
    assert saved.keys() == original.keys()
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    for key, tensor in original.items():
        same = saved[key] if key.endswith(suffixes) else saved[key].to(tensor.dtype)
        assert same.dtype == tensor.dtype and torch.equal(same, tensor), key
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert {key: config[key] for key in CASES[case]} == CASES[case]
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("storage", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int_quantized_files(storage, symmetric, tiny_llama, tmp_path, request) -> None:
    config = hf_quant.HfQuantConfig(bits=8, symmetric=symmetric, group_size=32, method="absmax", scale_dtype="float32")
    packed = load(tiny_llama, quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    for name, layer in quantized_modules(packed):  # what the library stores: signed codes, a byte each
        tensor = layer.quantized()
        for suffix in ("weight_packed", "weight_shape"):
            del tensors[f"{name}.{suffix}"]
        tensors[f"{name}.weight"] = (tensor.codes().int() - 128).to(torch.int8)
        if not symmetric:
            assert tensor.zero_point is not None
            tensors[f"{name}.weight_zero_point"] = (tensor.zero_point.int() - 128).to(torch.int8)
    path = shutil.copytree(tmp_path / "packed", tmp_path / "bytes")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"]["format"] = storage
    (path / "config.json").write_text(json.dumps(settings))
    model = load(path)
    assert len(list(quantized_modules(model))) == 14
    assert torch.equal(logits(model), logits(packed))
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == tensors.keys() and all(torch.equal(saved[key], tensors[key]) for key in saved)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["format"] == storage
    request.getfixturevalue("stock_as_known")
    hf_quant.disable()
    try:
        theirs = AutoModelForCausalLM.from_pretrained(
            path, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
        torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-4)
    finally:
        hf_quant.enable()


# --- act-order -------------------------------------------------------------------------------------------------------


def test_reordered_layers_are_whole_layers(stored) -> None:
    model = load(stored("gptq-act-order"), dtype=torch.float32)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    layer = model.model.layers[0].mlp.up_proj
    other = pickle.loads(pickle.dumps(layer))
    x = torch.randn(3, 64)
    assert torch.equal(other(x), layer(x))
    torch.testing.assert_close(layer(x), x @ layer.dequantize().t(), rtol=0, atol=1e-5)
    assert layer.quantized().to("cpu").order is not None
    with pytest.raises(FormatError, match="does not fit"):
        model.model.layers[0].mlp.gate_proj.assign(QuantLinear.from_quantized(_plain(layer)).quantized())
    assert all(not report.fused for report in describe_fused(model))
    torch.testing.assert_close(logits(model.dequantize()), expected, rtol=0, atol=1e-5)


def _plain(layer: OrderedQuantLinear) -> Any:
    tensor = layer.quantized()
    return type(tensor)(tensor.packed, tensor.scale, tensor.zero_point, tensor.scheme, tensor.shape)


def test_reordered_layers_compile_and_run_from_disk(stored, tmp_path) -> None:
    path = stored("gptq-asym-act-order")
    model = load(path, dtype=torch.float32)
    expected = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, fullgraph=True)), expected, rtol=0, atol=1e-4)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(
        path, device_map={**places, "model.layers.0": "disk"}, offload_folder=tmp_path / "disk", dtype=torch.float32
    )
    torch.testing.assert_close(logits(offloaded), expected, rtol=0, atol=1e-5)


def test_experts_that_are_stored_one_by_one(tmp_path) -> None:
    """transformers fuses experts, so its stock GPTQ does not load what GPTQModel writes for such models."""
    settings = AutoConfig.for_model(
        "qwen3_moe",
        **MODELS["llama"],
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        initializer_range=0.1,
    )
    AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(tmp_path / "float")
    packed = shutil.copytree(tmp_path / "float", tmp_path / "packed")
    values, tensors = {}, {}
    for key, tensor in load_file(tmp_path / "float" / "model.safetensors").items():
        if key.endswith("_proj.weight"):
            parts, value = pack(tensor, CASES["gptq-act-order"])
            tensors |= {f"{key.removesuffix('.weight')}.{suffix}": part.contiguous() for suffix, part in parts.items()}
        else:
            tensors[key] = value = tensor.half()
        values[key] = value.float().contiguous()
    save_file(values, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": CASES["gptq-act-order"]}))
    model = load(packed, dtype=torch.float32)
    assert len(list(quantized_modules(model))) == 2 * (4 + 4 * 3)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "float"))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_generate_equals_the_float_models_tokens(stored) -> None:
    path = stored("gptq-act-order")
    prompt, settings = IDS[:1, :5], {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours = load(path, dtype=torch.float32).generate(prompt, **settings)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent / "float").generate(prompt, **settings)
    assert torch.equal(ours, theirs)


def test_lora_trains_and_merges_on_reordered_columns(stored) -> None:
    peft = pytest.importorskip("peft")
    model = load(stored("gptq-act-order"), dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    wanted = layer.original_weight() + layer.delta(["default"])
    adapted(IDS, labels=IDS).loss.backward()
    assert float(layer.lora_A["default"].weight.grad.abs().sum()) > 0
    layer.merge()
    merged = layer.quant_layer.dequantize()
    assert float((merged - wanted).norm() / wanted.norm()) < 0.12  # the 4-bit grid
    assert layer.quant_layer.quantized().order is not None


def test_the_stock_loader_itself(stored, tmp_path) -> None:
    """GPTQModel in an environment of its own: ``HF_QUANT_GPTQMODEL`` is its Python (see scripts/check_stock.py)."""
    python = os.environ.get("HF_QUANT_GPTQMODEL")
    if not python:
        pytest.skip("HF_QUANT_GPTQMODEL names no Python with gptqmodel and optimum")
    child = Path(__file__).parents[2] / "scripts" / "stock_peers" / "child.py"
    for case in CASES:
        path = stored(case)
        out = tmp_path / case
        shutil.copytree(path, out)
        method = CASES[case]["quant_method"]
        backend = {"gptq": "torch", "awq": "torch_awq"}[method]
        job = {"method": method, "options": {"backend": backend}, "dtype": "float16", "source": "", "out": str(out)}
        (tmp_path / "jobs.json").write_text(json.dumps([{**job, "ids": IDS.tolist()}]))
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [python, str(child), str(tmp_path / "jobs.json")], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        error = tmp_path / f"{case}.error.txt"
        assert not error.exists(), error.read_text()
        theirs = load_file(tmp_path / f"{case}.logits.safetensors")["logits"]
        ours = logits(load(path))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01 * float(theirs.abs().max()), msg=case)


@pytest.mark.parametrize("grid", ["int", "nf4"])
def test_a_loaded_checkpoint_is_copied_and_pickled(grid, tiny_llama, tmp_path) -> None:
    load(tiny_llama, quantization_config=hf_quant.HfQuantConfig(grid=grid)).save_pretrained(tmp_path / "packed")
    model = load(tmp_path / "packed")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(list(quantized_modules(twin))) == 14
        assert torch.equal(logits(twin), logits(model))
        twin.save_pretrained(tmp_path / "again")
        again = load_file(tmp_path / "again" / "model.safetensors")
        saved = load_file(tmp_path / "packed" / "model.safetensors")
        assert saved.keys() == again.keys() and all(torch.equal(saved[key], again[key]) for key in saved)
