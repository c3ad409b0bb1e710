"""The compressed-tensors config: the library attaches exactly the plan, and we read what the library reads."""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
from typing import Any

import pytest
import torch
from torch import nn

from hf_quant.config import HfQuantConfig
from hf_quant.errors import FormatError
from hf_quant.formats import compressed_tensors as ct
from hf_quant.grids import PER_CHANNEL, Scheme
from hf_quant.plan import make_plan

G32 = Scheme("int", 4, True, 32)
RECIPES: dict[str, dict[str, Any]] = {
    "one scheme": {},
    "channel": {"bits": 8, "group_size": -1},
    "asymmetric": {"symmetric": False, "group_size": 64},
    "head too": {"overrides": {"lm_head": {"bits": 8}}},
    "mixed": {"overrides": {"re:.*mlp.*": {"bits": 8, "group_size": -1}, "q_proj": "float"}},
    "by layer": {"overrides": {"re:model.layers.0.*": {"bits": 8}, "model.layers.1.self_attn.o_proj": "float"}},
    "three": {"overrides": {"v_proj": {"group_size": 16}, "o_proj": {"symmetric": False}, "down_proj": "float"}},
}


def _library_schemes(model: nn.Module, config: dict[str, Any]) -> dict[str, Scheme]:
    """What compressed-tensors attaches to each module."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = copy.deepcopy({k: v for k, v in config.items() if k != "quant_method"})
    apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
    found = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            weights = scheme.weights
            group = PER_CHANNEL if weights.strategy == "channel" else weights.group_size
            found[name] = Scheme("int", weights.num_bits, weights.symmetric, group)
    return found


@pytest.mark.parametrize(
    ("recipe", "tied"), [*((name, False) for name in RECIPES), ("one scheme", True), ("mixed", True)]
)
def test_library_and_resolver_attach_exactly_the_plan(recipe, tied, tiny_model) -> None:
    model = tiny_model("llama", num_hidden_layers=3, tie_word_embeddings=tied)
    plan = make_plan(model, HfQuantConfig(grid="int", method="absmax", **RECIPES[recipe]))
    config = json.loads(json.dumps(ct.quantization_config(plan)))
    expected = {layer.name: layer.scheme for layer in plan.quantized}
    assert len(expected) > 3
    resolver = ct.read_config(config)
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    resolved = {n: resolver(n, m.in_features, m.out_features) for n, m in linears.items()}
    assert {n: scheme for n, scheme in resolved.items() if scheme} == expected
    assert _library_schemes(model, config) == expected


def test_one_scheme_targets_linear_and_ignores_by_name(plan_of) -> None:
    plan = plan_of(
        {
            "embed": ("Embedding", (384, 64), None),
            "layers.0.fc": ("Linear", (64, 64), G32),
            "layers.0.fc.bias": ("Bias", (64,), None),
            "layers.0.gate": ("TopKRouter", (4, 64), None),
            "layers.0.norm": ("Norm", (64,), None),
            "lm_head": ("Linear", (384, 64), None),
        }
    )
    config = ct.quantization_config(plan)
    assert list(config["config_groups"]) == ["group_0"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["ignore"] == ["layers.0.gate", "lm_head"]


_GATE = r"re:^model\.layers\.\d+\.mlp\.gate$"
_STORED_GATE = r"re:^model\.layers\.\d+\.block_sparse_moe\.gate$"


def test_modules_are_named_as_in_the_model_and_as_in_the_files(tiny_model) -> None:
    """vLLM looks for the names of the files: Mixtral's router would become a quantized layer there."""
    config = HfQuantConfig(grid="int", method="absmax", skip=["re:.*experts.*"])
    plan = make_plan(tiny_model("mixtral"), config)
    gate = "model.layers.1.block_sparse_moe.gate"
    assert plan.stored_names["model.layers.1.mlp.gate"] == gate
    assert not any("self_attn" in name or name == "lm_head" for name in plan.stored_names)
    made = json.loads(json.dumps(ct.quantization_config(plan)))
    assert {_GATE, _STORED_GATE} <= set(made["ignore"])
    resolver = ct.read_config(made)
    for name in (gate, "model.layers.0.block_sparse_moe.experts.3.w1", "model.layers.0.mlp.experts.3.w1"):
        assert resolver(name, 64, 64) is None
    assert resolver("model.layers.0.self_attn.q_proj", 64, 64) is not None


def test_every_group_has_both_names(tiny_model) -> None:
    config = HfQuantConfig(grid="int", method="absmax", overrides={"re:.*experts.*w2": {"bits": 8}})
    resolver = ct.read_config(ct.quantization_config(make_plan(tiny_model("mixtral"), config)))
    for block in ("mlp", "block_sparse_moe"):
        bits = [resolver(f"model.layers.0.{block}.experts.2.{name}", 128, 128) for name in ("w1", "w2", "w3")]
        assert [scheme and scheme.bits for scheme in bits] == [4, 8, 4]
        assert resolver(f"model.layers.0.{block}.gate", 64, 4) is None


def test_names_that_files_share_with_the_model_are_given_once(tiny_model) -> None:
    plan = make_plan(tiny_model("qwen3_moe"), HfQuantConfig(grid="int", method="absmax"))
    assert plan.stored_names == {}
    assert ct.quantization_config(plan)["ignore"] == [_GATE, "lm_head"]


def test_config_is_compact_and_accepted_by_transformers(tiny_model) -> None:
    from transformers import CompressedTensorsConfig

    model = tiny_model("llama", num_hidden_layers=3)
    plan = make_plan(model, HfQuantConfig(grid="int", **RECIPES["mixed"]))
    config = ct.quantization_config(plan)
    targets = list(itertools.chain.from_iterable(group["targets"] for group in config["config_groups"].values()))
    assert len(targets) == 6 and "Linear" not in targets
    assert config["ignore"] == [r"re:^model\.layers\.\d+\.self_attn\.q_proj$", "lm_head"]
    accepted = CompressedTensorsConfig(**config)
    assert accepted.is_quantization_compressed
    again = ct.read_config(accepted.to_dict())  # as transformers saves it, without our marker
    assert again("model.layers.2.mlp.up_proj", 64, 128) == Scheme("int", 8, True, PER_CHANNEL)
    assert again("model.layers.2.self_attn.q_proj", 64, 64) is None


def test_unwritable_plans_are_refused(plan_of) -> None:
    with pytest.raises(FormatError, match="quantizes nothing"):
        ct.quantization_config(plan_of({"a": ("Linear", (4, 4), None)}))
    with pytest.raises(FormatError, match=r"h\.0\.c_fc cannot be written.*Conv1D"):
        ct.quantization_config(plan_of({"h.0.c_fc": ("Conv1D", (64, 64), G32)}))


# ---- other people's configs


def _stock(**changes: Any) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "block_structure": None,
        "dynamic": False,
        "actorder": "weight",
        "observer": "minmax",
        "observer_kwargs": {},
    }
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
    }
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": None,
    }
    for key, value in changes.items():
        (weights if key in weights else group if key in group and key != "format" else config)[key] = value
    config.setdefault("config_groups", {"group_0": group})
    return config


def test_a_config_of_llm_compressor_is_read() -> None:
    resolver = ct.read_config(_stock())
    assert resolver("model.layers.0.mlp.up_proj", 64, 128) == G32
    assert resolver("lm_head", 64, 384) is None
    assert ct.read_config(_stock(strategy="channel", group_size=None))("a", 7, 3) == Scheme("int", 4, True, PER_CHANNEL)
    assert ct.read_config(_stock(strategy=None, group_size=-1))("a", 7, 3) == Scheme("int", 4, True, PER_CHANNEL)
    assert ct.read_config(_stock(strategy=None, group_size=16))("a", 64, 3) == Scheme("int", 4, True, 16)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("W4A16", (4, True)), ("w8a16", (8, True)), ("W4A16_ASYM", (4, False))],
)
def test_presets_equal_the_library_s(name, scheme) -> None:
    config = _stock(config_groups={name: ["Linear"]}, ignore=[])
    model = nn.ModuleDict({"fc": nn.Linear(128, 8)})
    assert ct.read_config(config)("fc", 128, 8) == Scheme("int", *scheme, 128) == _library_schemes(model, config)["fc"]


def test_matching_follows_the_library_s_rules() -> None:
    """Random targets and ignores over one model: whole names before patterns before class names."""
    model = nn.ModuleDict()
    for block in range(3):
        model[f"block{block}"] = nn.ModuleDict({"fc": nn.Linear(64, 32), "fc2": nn.Linear(64, 32), "act": nn.ReLU()})
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    pool = [*names, "re:.*fc", "re:.*fc$", r"re:block[01]", "re:block2.fc2", "re:^fc", "Linear", "Module", "ReLU", "fc"]
    draw = random.Random(0)
    seen = set()
    for _ in range(150):
        picked = draw.sample(pool, draw.randint(1, 6))
        groups = {}
        for index in range(draw.randint(1, 3)):
            targets = [target for position, target in enumerate(picked) if position % (index + 1) == 0]
            weights = {**_stock()["config_groups"]["group_0"]["weights"], "group_size": (16, 32, 64)[index]}
            groups[f"group_{index}"] = {"targets": targets, "weights": weights}
        config = _stock(config_groups=groups, ignore=draw.sample(pool, draw.randint(0, 2)))
        resolver = ct.read_config(config)
        ours = {name: found for name in names if (found := resolver(name, 64, 32)) is not None}
        assert ours == _library_schemes(copy.deepcopy(model), config), config
        seen.add(len(ours))
    assert len(seen) > 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quantization_status": "frozen"}, "quantization_status is 'frozen'"),
        ({"quantization_status": None}, "quantization_status"),
        ({"format": "int-quantized"}, "stored as 'int-quantized'"),
        ({"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        ({"config_groups": {}}, "config_groups is empty"),
        ({"config_groups": {"FP8": ["Linear"]}}, r"config_groups\['FP8'\]"),
        ({"config_groups": {"W4A16": "Linear"}}, r"config_groups\['W4A16'\]"),
        ({"targets": []}, "no list of targets"),
        ({"targets": "Linear"}, "no list of targets"),
        ({"ignore": "lm_head"}, "ignore is not a list"),
        ({"input_activations": {"num_bits": 8}}, "input_activations"),
        ({"output_activations": {"num_bits": 8}}, "output_activations"),
        ({"type": "float"}, "type='float'"),
        ({"num_bits": 3}, "num_bits=3"),
        ({"strategy": "block", "block_structure": [128, 128]}, "strategy='block'"),
        ({"strategy": "tensor", "group_size": None}, "strategy='tensor'"),
        ({"strategy": None, "group_size": None}, "strategy='tensor'"),
        ({"strategy": "tensor_group", "group_size": 16}, "strategy='tensor_group'"),
        ({"group_size": None}, "group_size=None"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": "32"}, "group_size='32'"),
        ({"dynamic": True}, "dynamic=True"),
        ({"actorder": "group"}, "actorder='group'"),
        ({"symmetric": "yes"}, "symmetric='yes'"),
    ],
)
def test_unsupported_configs_are_named(changes, named) -> None:
    with pytest.raises(FormatError, match=named):
        ct.read_config(_stock(**changes))


def test_unsupported_modules_are_named() -> None:
    resolver = ct.read_config(_stock(targets=["Linear", "Embedding"], ignore=[]))
    assert resolver("embed", 64, 384, ("Embedding",)) == Scheme("int", 4, True, 32)
    with pytest.raises(FormatError, match=r"embed as int4 sym g32, but.*FancyEmbedding"):
        resolver("embed", 64, 384, ("FancyEmbedding", "Embedding"))
    with pytest.raises(FormatError, match=r"fc as int4 sym g32.*FancyLinear"):
        resolver("fc", 64, 64, ("FancyLinear", "Linear"))
    with pytest.raises(FormatError, match=r"fc as int4 sym g32.*does not divide rows of 48"):
        resolver("fc", 48, 64)
    assert resolver("conv", 64, 64, ("Conv1D",)) is None
    with pytest.raises(FormatError, match="not a regular expression"):
        ct.read_config(_stock(targets=["re:("]))("fc", 64, 64)


@pytest.mark.parametrize(
    ("schemes", "words"),
    [
        ([G32], "no other argument"),
        ([G32, Scheme("int", 8, True, PER_CHANNEL)], "no other argument; do not pass"),
        ([Scheme("int", 4, False, 32)], r"CompressedTensorsConfig\(dequantize=True\)"),
        ([G32, Scheme("int", 4, False, 32)], "import hf_quant"),
    ],
)
def test_card_sentence(schemes, words, plan_of) -> None:
    plan = plan_of({f"fc{index}": ("Linear", (64, 64), scheme) for index, scheme in enumerate(schemes)})
    assert re.search(words, ct.stock_loading(plan))


def test_marker_does_not_disturb_the_library() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    config = {**_stock(), "hf_quant": {"version": 1}}
    with torch.device("meta"):
        assert QuantizationConfig.model_validate(config).format == "pack-quantized"
