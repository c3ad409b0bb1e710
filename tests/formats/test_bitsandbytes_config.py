"""The bitsandbytes config: transformers converts exactly the plan, and we read what transformers reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_quant.config import HfQuantConfig
from hf_quant.errors import FormatError
from hf_quant.formats import bitsandbytes as bnb
from hf_quant.grids import PER_CHANNEL, Scheme
from hf_quant.plan import is_linear, make_plan

NF4 = Scheme("nf4", 4, True, 64)
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "plain scales": {"double_quant": False, "group_size": 32},
    "some float": {"skip": ["re:.*layers.0.*", "re:.*h.0.attn.*", "fc1", "down_proj"]},
    "blocks": {"overrides": {"re:.*(mlp|fc2).*": {"group_size": 32}, "re:.*layers.1.*q_proj": {"grid": "fp4"}}},
}


_ENTRY = {"targets": ["a"], "grid": "nf4", "group_size": 64, "double_quant": False}


def _recipe(name: str, architecture: str) -> dict[str, Any]:
    """The recipe without the patterns that this architecture does not have."""
    has = {"gpt2": ("h.0.attn", "mlp"), "llama": ("layers.0", "down_proj", "mlp", "q_proj")}
    parts = has.get(architecture, ("layers.0", "fc1", "fc2", "q_proj"))
    recipe = dict(RECIPES[name])
    if "skip" in recipe:
        recipe["skip"] = [pattern for pattern in recipe["skip"] if any(part in pattern for part in parts)]
    if "overrides" in recipe:
        chosen = {key: value for key, value in recipe["overrides"].items() if any(part in key for part in parts)}
        recipe["overrides"] = chosen
    return recipe


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", ["llama", "opt", "phi", "gpt2"])
def test_transformers_and_resolver_convert_exactly_the_plan(recipe, architecture, tiny_model) -> None:
    from bitsandbytes.nn import Linear4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    source = tiny_model(architecture)
    plan = make_plan(source, HfQuantConfig(grid="nf4", method="absmax", **_recipe(recipe, architecture)))
    config = json.loads(json.dumps(bnb.quantization_config(plan, dtype=torch.bfloat16)))
    expected = {layer.name: layer.scheme for layer in plan.quantized}
    assert len(expected) > 2
    resolver = bnb.read_config(config)
    resolved = {}
    for layer in plan.layers:
        if layer.kind in ("Linear", "Conv1D"):
            resolved[layer.name] = resolver(layer.name, layer.shape[1], layer.shape[0], (layer.kind,))
    assert {name: scheme for name, scheme in resolved.items() if scheme} == expected
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    stock = BitsAndBytesConfig.from_dict(config)
    replace_with_bnb_linear(model, stock.llm_int8_skip_modules, stock, pre_quantized=True)
    converted = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert converted == set(expected)
    assert {name for name, module in model.named_modules() if is_linear(module)} == set(resolved) - converted


def test_config_is_what_transformers_saves(plan_of) -> None:
    plan = plan_of({"a.fc": ("Linear", (64, 128), NF4), "lm_head": ("Linear", (384, 64), None)})
    config = bnb.quantization_config(plan)
    saved = BitsAndBytesConfig.from_dict(config).to_dict()
    assert saved == {key: value for key, value in config.items() if key != "hf_quant"}
    assert set(saved) == set(BitsAndBytesConfig(load_in_4bit=True).to_dict())
    assert config["bnb_4bit_compute_dtype"] == "bfloat16" and config["llm_int8_skip_modules"] == ["lm_head"]
    assert bnb.quantization_config(plan, dtype=torch.float16)["bnb_4bit_compute_dtype"] == "float16"


def test_short_float_names_do_not_skip_their_namesakes(plan_of) -> None:
    plan = plan_of({"fc1": ("Linear", (64, 64), None), "layers.0.fc1": ("Linear", (64, 64), NF4)})
    config = bnb.quantization_config(plan)
    assert config["llm_int8_skip_modules"] == ["^fc1$"]
    resolver = bnb.read_config(config)
    assert resolver("fc1", 64, 64) is None and resolver("layers.0.fc1", 64, 64) == NF4


def test_no_float_linear_is_an_empty_list_not_the_default(plan_of) -> None:
    """None would make transformers skip the head by itself."""
    config = bnb.quantization_config(plan_of({"lm_head": ("Linear", (384, 64), NF4)}))
    assert config["llm_int8_skip_modules"] == []
    assert bnb.read_config(config)("lm_head", 64, 384) == NF4


def test_per_channel_is_read_back_as_its_block(plan_of) -> None:
    plan = plan_of({"fc": ("Conv1D", (8, 128), Scheme("nf4", 4, True, PER_CHANNEL, True))})
    config = bnb.quantization_config(plan)
    assert config["bnb_4bit_use_double_quant"] is True
    assert bnb.read_config(config)("fc", 128, 8, ("Conv1D",)) == Scheme("nf4", 4, True, 128, True)


def test_unwritable_plans_are_refused(plan_of) -> None:
    with pytest.raises(FormatError, match="quantizes nothing"):
        bnb.quantization_config(plan_of({"a": ("Linear", (4, 64), None)}))
    with pytest.raises(FormatError, match=r"a cannot be written.*straddle its rows of 576"):
        bnb.quantization_config(plan_of({"a": ("Linear", (4, 576), Scheme("nf4", 4, True, 128))}))


# ---- other people's configs


def test_a_config_of_transformers_is_read() -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True).to_dict()
    resolver = bnb.read_config(config)
    assert resolver("model.layers.0.mlp.up_proj", 64, 128) == Scheme("nf4", 4, True, 64, True)
    assert resolver("lm_head", 64, 384) is None
    assert bnb.read_config(config, default_skips=())("lm_head", 64, 384) is not None
    assert resolver("embed", 64, 384, ("Embedding",)) is None
    assert resolver("head", 64, 384, ("FancyLinear", "Linear")) is None  # transformers converts nn.Linear itself only
    with pytest.raises(FormatError, match=r"quantizes fc as nf4 g64 dq, but blocks of 64 straddle its rows of 96"):
        resolver("fc", 96, 64)
    legacy = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    assert bnb.read_config(legacy)("fc", 64, 64) == Scheme("fp4", 4, True, 64)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quant_method": "gptq"}, "not bitsandbytes 4-bit"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "not bitsandbytes 4-bit"),
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type is 'int4'"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage is 'bfloat16'"),
        ({"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules is not a list"),
        ({"llm_int8_skip_modules": [1]}, "llm_int8_skip_modules is not a list"),
        ({"hf_quant": []}, "marker of the config is damaged"),
        ({"hf_quant": {"version": 1}}, "marker of the config is damaged"),
        ({"hf_quant": {"version": 1, "schemes": [{"targets": ["a"]}]}}, "marker of the config is damaged"),
        ({"hf_quant": {"version": 1, "schemes": [7]}}, "marker of the config is damaged"),
        ({"hf_quant": {"version": 1, "schemes": [{**_ENTRY, "grid": "nf5"}]}}, "marker of the config is damaged"),
        ({"hf_quant": {"version": 2, "schemes": []}}, "version 2"),
    ],
)
def test_unsupported_configs_are_named(changes, named) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()
    with pytest.raises(FormatError, match=named):
        bnb.read_config({**config, **changes})


def test_broken_skip_pattern_is_named() -> None:
    config = {**BitsAndBytesConfig(load_in_4bit=True).to_dict(), "llm_int8_skip_modules": ["("]}
    with pytest.raises(FormatError, match="llm_int8_skip_modules has"):
        bnb.read_config(config)("fc", 64, 64)


def test_card_sentence(plan_of) -> None:
    assert bnb.stock_loading(plan_of({"a": ("Linear", (64, 64), NF4)})).endswith("and no other argument.")


def test_card_warns_of_rows_that_the_library_refuses(plan_of) -> None:
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn import Linear4bit

    assert "rows of a.fc are not a multiple of 32" in bnb.stock_loading(plan_of({"a.fc": ("Linear", (33, 64), NF4)}))
    layer = Linear4bit(64, 33, bias=False, quant_type="nf4").to("cpu").eval()
    if has_avx512bf16():
        with torch.no_grad(), pytest.raises(AssertionError, match="N must be divisible"):
            layer(torch.randn(2, 64))
