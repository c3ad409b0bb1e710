"""Bytes, bits and kernels of models in other formats than float; the clock of the speed measurement."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_quant.errors import EvaluationError
from hf_quant.evaluation.machine import peak_growth
from hf_quant.evaluation.size import bits_per_weight, disk_bytes, memory_bytes, token_bytes
from hf_quant.evaluation.speed import Subject, kernels, measure


def _directory(path, tensors, quantized=True):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if quantized:
        config["quantization_config"] = {"quant_method": "any"}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def reference(tmp_path):
    tensors = {
        "model.embed.weight": torch.zeros(100, 64),
        "model.norm.weight": torch.ones(64),
        "model.q.weight": torch.zeros(32, 64),
        "model.q.bias": torch.zeros(32),
        "model.o.weight": torch.zeros(64, 32),
    }
    return _directory(tmp_path / "float", tensors, quantized=False)


def _kept():
    return {
        "model.embed.weight": torch.zeros(100, 64),
        "model.norm.weight": torch.ones(64),
        "model.q.bias": torch.zeros(32),
    }


def _ones(*shape, dtype):
    return torch.ones(shape, dtype=dtype)


FORMATS = {
    # name -> (tensors of q [32, 64] and o [64, 32], bits per weight)
    "compressed-tensors int4 asym g32": (
        {
            "model.q.weight_packed": _ones(32, 8, dtype=torch.int32),
            "model.q.weight_scale": _ones(32, 2, dtype=torch.bfloat16),
            "model.q.weight_zero_point": _ones(4, 2, dtype=torch.int32),
            "model.q.weight_shape": _ones(2, dtype=torch.int64),
            "model.o.weight_packed": _ones(64, 4, dtype=torch.int32),
            "model.o.weight_scale": _ones(64, 1, dtype=torch.bfloat16),
            "model.o.weight_zero_point": _ones(8, 1, dtype=torch.int32),
            "model.o.weight_shape": _ones(2, dtype=torch.int64),
        },
        4 + (16 + 4) / 32,
    ),
    "bitsandbytes nf4 g32": (
        {
            name: tensor
            for layer in ("q", "o")
            for name, tensor in {
                f"model.{layer}.weight": _ones(1024, 1, dtype=torch.uint8),
                f"model.{layer}.weight.absmax": _ones(64, dtype=torch.float32),
                f"model.{layer}.weight.quant_map": _ones(16, dtype=torch.float32),
                f"model.{layer}.weight.quant_state.bitsandbytes__nf4": _ones(90, dtype=torch.uint8),
            }.items()
        },
        4 + 32 / 32,
    ),
    "gptq int4 g32, one layer left in float": (
        {
            "model.q.qweight": _ones(8, 32, dtype=torch.int32),
            "model.q.qzeros": _ones(2, 4, dtype=torch.int32),
            "model.q.scales": _ones(2, 32, dtype=torch.float16),
            "model.q.g_idx": _ones(64, dtype=torch.int32),
            "model.o.weight": _ones(64, 32, dtype=torch.float16),
        },
        4 + (16 + 4) / 32,
    ),
    "llm.int8": (
        {
            "model.q.weight": _ones(32, 64, dtype=torch.int8),
            "model.q.SCB": _ones(32, dtype=torch.float32),
            "model.q.weight_format": torch.tensor(0, dtype=torch.uint8),
            "model.o.weight": _ones(64, 32, dtype=torch.float32),
        },
        8 + 32 / 64,
    ),
}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_bits_per_weight_of_formats(tmp_path, reference, name):
    tensors, bits = FORMATS[name]
    candidate = _directory(tmp_path / "candidate", {**_kept(), **tensors})
    assert bits_per_weight(candidate, reference) == pytest.approx(bits)
    assert disk_bytes(candidate) == (candidate / "model.safetensors").stat().st_size


def test_bits_per_weight_of_float_and_of_strangers(tmp_path, reference):
    assert bits_per_weight(reference, reference) == 32
    stranger = _directory(tmp_path / "stranger", {"other.q.weight_packed": _ones(32, 8, dtype=torch.int32)})
    with pytest.raises(EvaluationError, match="no quantized tensor of stranger"):
        bits_per_weight(stranger, reference)


def test_memory_counts_shared_tensors_once(tiny_model):
    model = tiny_model("gpt2")  # its head is tied to its embedding
    unique = {p.data_ptr(): p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers())}
    assert memory_bytes(model) == sum(unique.values())
    half = memory_bytes(tiny_model("gpt2").to(torch.bfloat16))
    assert half * 2 == memory_bytes(model)


def test_memory_counts_what_bitsandbytes_keeps_beside_the_codes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=False)
    layer.weight = bitsandbytes.nn.Params4bit(torch.randn(64, 128), requires_grad=False, compress_statistics=False)
    layer.to("cpu")
    codes, scales, table = 64 * 128 // 2, 64 * 128 // 64 * 4, 16 * 4
    assert memory_bytes(layer) == codes + scales + table


def test_kernels_are_counted_by_name(tiny_model):
    class Ours(nn.Module):
        kernel_label = "reference"

    assert kernels(tiny_model("opt")) == {"float": 13}
    assert kernels(tiny_model("gpt2")) == {"float": 9}
    assert kernels(nn.Sequential(Ours(), Ours(), nn.Linear(2, 2), nn.LayerNorm(2))) == {"reference": 2, "float": 1}


def test_models_take_turns_and_sampling_is_off(tiny_model):
    models = [tiny_model("llama"), tiny_model("llama")]
    models[0].generation_config.do_sample = True
    models[0].generation_config.temperature = 3.0
    order = []
    for name, model in zip("ab", models, strict=True):
        model.register_forward_pre_hook(lambda module, args, name=name: order.append(name))
    seconds = []
    speeds = measure(
        [Subject("float", models[0], 1.5), Subject("quantized", models[1], 2.5)],
        torch.randint(3, 384, (600,)),
        repeats=2,
        decode_tokens=5,
        advance=lambda: seconds.append(1),
    )
    turn = ["a"] * 13 + ["b"] * 13  # a prefill, a first token, five decoded tokens; a prefill and five tokens of eight
    assert order == turn * 3
    assert len(seconds) == 6
    assert [s.load_seconds for s in speeds] == [1.5, 2.5]
    assert speeds[0].prefill_tokens == 256, "the context of the tiny model"
    assert speeds[0].decode_tokens == 5 and speeds[0].dtype == "float32"
    assert (speeds[0].batch, speeds[0].batch_prefill_tokens) == (8, 75), "600 tokens of text"
    for speed in speeds:
        assert speed.first_token_seconds > 0 and speed.batch_decode_tokens_per_second > 0
        rate = speed.decode_tokens_per_second * speed.token_bytes / 1e9
        assert speed.bandwidth_share == pytest.approx(rate / speed.read_bandwidth)


def test_bytes_read_per_token(tiny_model):
    model = tiny_model("llama")
    assert not model.config.tie_word_embeddings
    every = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert token_bytes(model) == every - model.get_input_embeddings().weight.nbytes, "a row of the table is looked up"
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    assert token_bytes(model) == every - model.get_input_embeddings().weight.nbytes, "read whole, as the head"
    experts = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mixtral", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    )  # fmt: skip
    assert token_bytes(experts) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_growth_sees_what_is_freed_again():
    with peak_growth("cpu") as peak:
        block = torch.ones(64 << 20, dtype=torch.uint8)
        del block
    assert 60 << 20 <= peak.nbytes < 200 << 20
    with peak_growth("cpu") as peak:
        pass
    assert peak.nbytes < 30 << 20, "an earlier peak does not count"


def test_decode_excludes_the_prompt(tiny_model):
    """A prefill made a hundred times slower must not slow decoding."""
    import time

    model = tiny_model("llama")
    model.register_forward_pre_hook(
        lambda module, args, kwargs: time.sleep(0.5) if kwargs["input_ids"].shape[1] > 1 else None, with_kwargs=True
    )
    (run,) = measure([Subject("float", model, 0.0)], torch.randint(3, 384, (64,)), repeats=1, decode_tokens=9)
    assert run.prefill_tokens_per_second < 64 / 0.5
    assert run.decode_tokens_per_second > 8 / 0.5
