"""The plan: which rule decides for which layer, groups that do not divide, tied weights, and bytes that are true."""

from __future__ import annotations

import json
import struct
import time

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import hf_quant
from hf_quant.config import HfQuantConfig
from hf_quant.errors import CheckpointError, PlanError
from hf_quant.plan import make_plan
from hf_quant.plan_rules import matches
from hf_quant.skeleton import plan_directory

Q0, UP1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
MIXED = {"overrides": {"down_proj": {"bits": 8}, Q0: "float", "v_proj": {"symmetric": False}}}


def _layers(model, **keys):
    return {layer.name: layer for layer in make_plan(model, HfQuantConfig(**keys)).layers}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.10.mlp.up_proj", False),
        ("up_proj", "model.layers.1.mlp.up_proj", True),
        ("up_proj", "model.layers.1.mlp.gate_up_proj", False),
        ("mlp", "model.layers.1.mlp.up_proj", False),
        ("re:.*mlp.*", "model.layers.1.mlp.up_proj", True),
        ("re:mlp", "model.layers.1.mlp.up_proj", False),
    ],
)
def test_patterns(pattern, name, expected) -> None:
    assert matches(pattern, name) is expected


def test_precedence(tiny_model) -> None:
    overrides = {
        "re:.*q_proj": {"bits": 8},  # comes first, but an exact name wins
        Q0: {"group_size": 64},
        "q_proj": {"symmetric": False},  # never reached
        UP1: {"bits": 8},  # an exact name wins over skip, too
    }
    layers = _layers(tiny_model("llama"), overrides=overrides, skip=["re:.*up_proj", "o_proj"])
    assert layers[Q0].scheme.label == "int4 sym g64"
    assert layers[Q0].rule == f"override {Q0!r}"
    assert layers["model.layers.1.self_attn.q_proj"].rule == "override 're:.*q_proj'"
    assert layers[UP1].scheme.bits == 8
    assert layers["model.layers.0.mlp.up_proj"].rule == "skip 're:.*up_proj'"
    assert layers["model.layers.0.self_attn.o_proj"].scheme is None
    assert layers["model.layers.0.self_attn.k_proj"].rule == "default"


def test_skips_add_to_the_defaults(tiny_model) -> None:
    layers = _layers(tiny_model("llama"), skip=["o_proj"])
    assert (layers["lm_head"].rule, layers["lm_head"].note) == ("default skip", "output head")


@pytest.mark.parametrize("option", [{"skip": ["qproj"]}, {"overrides": {"qproj": {"bits": 8}}}], ids=str)
def test_a_pattern_without_a_match_names_the_nearest(option, tiny_model) -> None:
    with pytest.raises(PlanError, match=r"'qproj' matches no linear layer.*q_proj"):
        make_plan(tiny_model("llama"), HfQuantConfig(**option))


def test_contradictions_and_broken_patterns(tiny_model) -> None:
    model = tiny_model("llama")
    with pytest.raises(PlanError, match="in skip and in overrides"):
        make_plan(model, HfQuantConfig(skip=["q_proj"], overrides={"q_proj": {"bits": 8}}))
    with pytest.raises(PlanError, match="not a regular expression"):
        make_plan(model, HfQuantConfig(skip=["re:("]))
    with pytest.raises(PlanError, match="nothing to quantize"):
        make_plan(model, HfQuantConfig(skip=["re:.*"]))


@pytest.mark.parametrize(
    ("rows", "keys", "label"),
    [
        (576, {}, "int4 sym g32"),
        (576, {"group_size": 128}, "int4 sym g64"),
        (576, {"bits": 8}, "int8 sym g64"),
        (576, {"group_size": 100}, "int4 sym g64"),
        (576, {"group_size": -1}, "int4 sym per-channel"),
        (576, {"grid": "nf4"}, "nf4 g64 dq"),
        (576, {"grid": "nf4", "group_size": 128}, "nf4 g64 dq"),
        (100, {}, "int4 sym per-channel"),
        (100, {"bits": 8, "symmetric": False}, "int8 asym per-channel"),
        (30, {}, "int4 sym per-channel"),
        (100, {"grid": "nf4"}, None),
        (30, {"grid": "fp4"}, None),
    ],
)
def test_groups_that_do_not_divide(rows, keys, label) -> None:
    model = nn.Sequential(nn.Linear(rows, 8), nn.Linear(64, 8), nn.Linear(8, 8))
    config = HfQuantConfig(**keys)
    layer = make_plan(model, config).layers[0]
    assert (layer.scheme.label if layer.scheme else None) == label
    wanted = config.default.scheme.group(rows)
    changed = layer.scheme is None or layer.scheme.group(rows) != wanted
    assert bool(layer.note) is changed
    strict = HfQuantConfig(**keys, on_indivisible="error")
    if changed:
        with pytest.raises(PlanError, match=f"0: .*{rows}"):
            make_plan(model, strict)
    else:
        assert make_plan(model, strict).layers[0].scheme == layer.scheme


def test_tied_weights_stay_in_float(tiny_model) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    head = _layers(model)["lm_head"]
    assert head.scheme is None and "tied to model.embed_tokens" in head.note
    assert head.float_bytes == head.planned_bytes == 0
    named = _layers(model, overrides={"re:.*head": {"bits": 8}})["lm_head"]
    assert named.scheme is None, "only its own name unties a head"


def test_a_tied_head_is_untied_by_its_name(tiny_model) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    plan = make_plan(model, HfQuantConfig(overrides={"lm_head": {"bits": 8}}))
    layers = {layer.name: layer for layer in plan.layers}
    head, table = layers["lm_head"], layers["model.embed_tokens"]
    assert head.scheme.label == "int8 sym g64"
    assert head.untied_from == "model.embed_tokens.weight"
    assert "untied from model.embed_tokens.weight, which stays in float" in head.note
    assert head.float_bytes == 0 and head.planned_bytes > head.numel
    assert table.scheme is None and table.planned_bytes == table.float_bytes > 0


def test_an_untied_head_is_quantized_by_its_name(tiny_model) -> None:
    layers = _layers(tiny_model("llama"), overrides={"lm_head": {"bits": 8}})
    assert layers["lm_head"].scheme.label == "int8 sym g64"


def test_modules_that_the_model_keeps_in_float32(tiny_model) -> None:
    model = tiny_model("llama")
    model._keep_in_fp32_modules = {"down_proj"}
    layers = _layers(model)
    assert layers["model.layers.0.mlp.down_proj"].note == "the model keeps it in float32"
    assert _layers(model, overrides={"down_proj": {"bits": 8}})["model.layers.0.mlp.down_proj"].scheme.bits == 8


def test_heads_of_other_tasks_stay_in_float(tiny_model) -> None:
    from transformers import BertForSequenceClassification, LlamaForSequenceClassification

    classifier = LlamaForSequenceClassification(tiny_model("llama").config)
    assert _layers(classifier)["score"].scheme is None
    settings = BertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    encoder = _layers(BertModel(settings))
    assert [name for name, q in encoder.items() if q.kind == "Linear" and not q.scheme] == ["pooler.dense"]
    assert len([q for q in encoder.values() if q.scheme]) == 6
    labels = _layers(BertForSequenceClassification(settings))
    assert [name for name, q in labels.items() if q.kind == "Linear" and not q.scheme] == ["classifier"]


def test_what_is_not_a_plain_linear_layer_says_why(tiny_model) -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(32, 8), Special(32, 8), Conv1D(8, 32), nn.Embedding(9, 8), nn.Linear(8, 8))
    layers = {layer.name: layer for layer in make_plan(model, HfQuantConfig()).layers}
    assert "subclass" in layers["1"].note
    assert layers["2"].kind == "Conv1D" and layers["2"].shape == (8, 32) and layers["2"].scheme
    assert layers["3"].note == "embeddings stay in float unless an override names them"


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("llama", {}),
        ("phi", {"symmetric": False}),
        ("opt", {"bits": 8, "symmetric": False, "group_size": -1}),
        ("llama", MIXED),
        ("qwen3", {"grid": "nf4"}),
        ("gpt2", {"grid": "nf4", "double_quant": False}),
        ("llama", {"grid": "fp4"}),
    ],
    ids=str,
)
def test_planned_bytes_are_the_bytes_written(architecture, keys, tiny_checkpoint, tmp_path) -> None:
    source, config = tiny_checkpoint(architecture), HfQuantConfig(**keys, method="absmax")
    plan = plan_directory(source, config)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert model.hf_quantizer.plan == plan
    model.save_pretrained(tmp_path)
    written = 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            written += tensor.numel() * tensor.element_size()
    # a mean scale is written as decimal digits, as many as it needs
    slack = 8 * len(plan.quantized) if config.double_quant else 0
    assert abs(plan.planned_bytes - written) <= slack
    assert plan.peak_bytes > plan.planned_bytes


def test_a_70b_directory_is_planned_in_seconds(tmp_path) -> None:
    settings = AutoConfig.for_model(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    settings.save_pretrained(tmp_path)
    with torch.device("meta"):
        tensors = list(LlamaForCausalLM(settings).state_dict().items())
    weight_map = {}
    for start in range(0, len(tensors), 25):
        shard, header, end = f"model-{start:05d}.safetensors", {}, 0
        for name, tensor in tensors[start : start + 25]:
            weight_map[name] = shard
            size = 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
            end += size
        encoded = json.dumps(header).encode()
        with (tmp_path / shard).open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            file.truncate(8 + len(encoded) + end)  # sparse: nothing is written
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    start_time = time.monotonic()
    plan = plan_directory(tmp_path, HfQuantConfig())
    assert time.monotonic() - start_time < 10
    assert plan.float_bytes == pytest.approx(141.1e9, rel=1e-3)
    assert plan.bits_per_weight == pytest.approx(4.5)
    assert len(plan.quantized) == 80 * 7


def test_a_quantized_directory_is_not_planned(tiny_llama, tmp_path) -> None:
    hf_quant.quantize(tiny_llama, HfQuantConfig(method="absmax"), tmp_path / "q")
    with pytest.raises(CheckpointError, match="quantized already"):
        plan_directory(tmp_path / "q", HfQuantConfig())
