"""HfQuantConfig: every wrong key and value is an error that names it; a right one survives every way of storing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from hf_quant.config import HfQuantConfig
from hf_quant.errors import ConfigError
from hf_quant.grids import Scheme

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))

WRONG = [
    ({"bits": 3}, "bits=3"),
    ({"bits": "4"}, "bits='4'"),
    ({"bits": True}, "bits=True"),
    ({"grid": "int4"}, "grid='int4'"),
    ({"grid": "nf4", "bits": 8}, "bits=8"),
    ({"grid": "fp4", "symmetric": False}, "zero points"),
    ({"double_quant": True}, "double_quant"),
    ({"symmetric": "yes"}, "symmetric='yes'"),
    ({"group_size": 0}, "group_size=0"),
    ({"group_size": -2}, "group_size=-2"),
    ({"group_size": 4}, "group_size=4"),
    ({"group_size": 32.0}, "group_size=32.0"),
    ({"method": "awq"}, "method='awq'"),
    ({"preset": "quick"}, "preset='quick'"),
    ({"calibration": {"samples": 8}}, "calibration is given"),
    ({"tuning": {"steps": 8}}, "tuning is given"),
    ({"preset": "fast", "calibration": {}}, "calibration is given"),
    ({"preset": "balanced", "calibration": {"sample": 8}}, "unknown config key 'sample'"),
    ({"preset": "balanced", "calibration": {"samples": 1}}, "calibration.samples=1"),
    ({"preset": "best", "tuning": {"learning_rate": 0.0}}, "tuning.learning_rate=0.0"),
    ({"skip": "lm_head"}, "skip='lm_head'"),
    ({"skip": [3]}, "skip.0=3"),
    ({"on_indivisible": "pad"}, "on_indivisible='pad'"),
    ({"scale_dtype": "float8"}, "scale_dtype='float8'"),
    ({"dequantize": "no"}, "dequantize='no'"),
    ({"quant_method": "gptq"}, "quant_method='gptq'"),
    ({"group": 32}, "unknown config key 'group'"),
    ({"overrides": {"q_proj": {"bit": 8}}}, "unknown config key 'bit'"),
    ({"overrides": {"q_proj": "int8"}}, "overrides.q_proj"),
    ({"overrides": {"q_proj": {"bits": 5}}}, "overrides.q_proj.bits=5"),
    ({"overrides": {"q_proj": {"grid": "nf4"}}}, "mixes"),
    ({"grid": "nf4", "overrides": {"q_proj": {"bits": 8}}}, "q_proj"),
    ({"overrides": {"q_proj": {"group_size": 5}}}, "q_proj"),
]
RIGHT = [
    {},
    {"bits": 8},
    {"bits": 8, "symmetric": False, "group_size": -1, "method": "absmax"},
    {"grid": "nf4"},
    {"grid": "fp4", "double_quant": False, "group_size": 128},
    {"overrides": {"re:.*v_proj": {"symmetric": False}, "model.layers.0": "float", "down_proj": {"bits": 8}}},
    {"skip": ["model.layers.1"], "on_indivisible": "error", "scale_dtype": "float16", "kernel": "reference"},
]


@pytest.mark.parametrize(("keys", "message"), WRONG, ids=lambda value: str(value)[:50])
def test_wrong_keys_and_values_are_named(keys, message) -> None:
    with pytest.raises(ConfigError, match="Fix: ") as caught:
        HfQuantConfig(**keys)
    assert message in str(caught.value)


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="group_size"):
        HfQuantConfig(groupsize=32)


@pytest.mark.parametrize(
    ("keys", "scheme"),
    [
        ({}, Scheme("int", 4, True, 32)),
        ({"bits": 8}, Scheme("int", 8, True, 128)),
        ({"grid": "nf4"}, Scheme("nf4", 4, True, 64, True)),
        ({"grid": "fp4", "double_quant": False}, Scheme("fp4", 4, True, 64, False)),
    ],
)
def test_defaults_follow_the_grid(keys, scheme) -> None:
    assert HfQuantConfig(**keys).default.scheme == scheme


@pytest.mark.parametrize(
    ("keys", "override", "scheme"),
    [
        ({"group_size": 64}, {"bits": 8}, Scheme("int", 8, True, 128)),
        ({"group_size": 64}, {"symmetric": False}, Scheme("int", 4, False, 64)),
        ({"symmetric": False}, {"bits": 8, "group_size": -1}, Scheme("int", 8, False, -1)),
        ({"grid": "nf4", "double_quant": False}, {"grid": "fp4"}, Scheme("fp4", 4, True, 64, False)),
        ({"grid": "nf4"}, {"group_size": 32}, Scheme("nf4", 4, True, 32, True)),
    ],
)
def test_an_override_inherits_what_still_makes_sense(keys, override, scheme) -> None:
    request = HfQuantConfig(**keys, overrides={"q_proj": override}).override("q_proj")
    assert request is not None
    assert request.scheme == scheme


@pytest.mark.parametrize("keys", RIGHT, ids=str)
def test_every_way_of_storing_gives_the_same_config(keys, tmp_path) -> None:
    config = HfQuantConfig(**keys)
    assert HfQuantConfig(**config.to_dict()) == config
    assert HfQuantConfig.from_dict(config.to_dict()) == config
    assert AutoQuantizationConfig.from_dict(config.to_dict()) == config
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.to_dict()))
    assert HfQuantConfig.from_recipe(recipe) == config
    settings = AutoConfig.for_model("llama", quantization_config=config)
    settings.save_pretrained(tmp_path)
    assert HfQuantConfig(**AutoConfig.from_pretrained(tmp_path).quantization_config) == config


def test_to_dict_is_a_copy() -> None:
    config = HfQuantConfig(overrides={"q_proj": {"bits": 8}})
    config.to_dict()["overrides"]["q_proj"]["bits"] = 4
    assert config.overrides == {"q_proj": {"bits": 8}}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_reads_and_means_what_it_is_named(recipe) -> None:
    config = HfQuantConfig.from_recipe(recipe)
    assert config.grid == ("nf4" if recipe.stem == "nf4" else "int")
    assert config.bits == (8 if recipe.stem == "int8" else 4)
    assert config.symmetric == (recipe.stem != "int4-asym")
    assert bool(config.overrides) == (recipe.stem == "mixed")


def test_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} >= {"int4", "int4-asym", "int8", "nf4", "mixed"}


def test_arguments_win_over_a_recipe() -> None:
    config = HfQuantConfig.from_recipe(RECIPES[0].with_name("int4.yaml"), bits=8, group_size=None)
    assert (config.bits, config.group_size) == (8, 32)


@pytest.mark.parametrize("content", ["- 4", "bits: [", "bits: 7", "4: bits", "\x00"], ids=repr)
def test_a_broken_recipe_is_an_error(content, tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    with pytest.raises(ConfigError):
        HfQuantConfig.from_recipe(recipe)


def test_a_missing_recipe_is_an_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        HfQuantConfig.from_recipe(tmp_path / "none.yaml")


def test_presets_fill_what_is_not_given_and_survive_a_round_trip() -> None:
    fast, balanced, best = (HfQuantConfig(preset=name) for name in ("fast", "balanced", "best"))
    assert (fast.method, fast.calibration, fast.tuning) == ("search", None, None)
    assert balanced.method == "gptq" and balanced.calibration is not None and balanced.tuning is None
    assert best.calibration is not None and best.tuning is not None
    assert best.calibration["samples"] > balanced.calibration["samples"]
    mine = HfQuantConfig(preset="best", calibration={"source": "docs", "samples": 4}, tuning={"steps": 0})
    assert mine.calibration == {"source": "docs", "samples": 4, "length": 512, "seed": 0, "fold": True}
    assert mine.tuning is not None and mine.tuning["steps"] == 0
    for config in (fast, balanced, best, mine, HfQuantConfig(method="gptq", bits=8)):
        assert HfQuantConfig(**config.to_dict()) == config


def test_a_calibrated_override_alone_asks_for_data() -> None:
    config = HfQuantConfig(overrides={"down_proj": {"method": "gptq"}})
    assert config.method == "search" and config.calibration is not None
