"""Flags and recipes become one config; the recipes that ship are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_quant.cli.options import build_config, parse_override
from hf_quant.config import HfQuantConfig
from hf_quant.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    ("text", "pattern", "value"),
    [
        ("down_proj=bits=8,group_size=64", "down_proj", {"bits": 8, "group_size": 64}),
        ("model.layers.0=float", "model.layers.0", "float"),
        (r"re:.*\.(k|v)_proj=symmetric=false", r"re:.*\.(k|v)_proj", {"symmetric": False}),
        ("re:(?=model).*=float", "re:(?=model).*", "float"),
        ("re:a{1,2}=bits=8", "re:a{1,2}", {"bits": 8}),
        ("lm_head=method=absmax", "lm_head", {"method": "absmax"}),
        ("q_proj=group_size=-1", "q_proj", {"group_size": -1}),
    ],
)
def test_override_is_parsed(text: str, pattern: str, value: object) -> None:
    assert parse_override(text) == (pattern, value)


@pytest.mark.parametrize("text", ["", "down_proj", "=float", "down_proj=", "down_proj=8", "down_proj=bits"])
def test_malformed_override_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--override"):
        parse_override(text)


def test_a_misspelt_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"group_siz.*did you mean group_size"):
        build_config(override=["down_proj=group_siz=64"])


def test_flags_win_over_the_recipe_and_add_to_its_skips(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("bits: 8\ngroup_size: 64\nskip: [a]\noverrides: {b: float, c: {bits: 4}}\n", encoding="utf-8")
    config = build_config(recipe, group_size=32, symmetric=None, skip=["d"], override=["c=float", "e=bits=4"])
    assert (config.bits, config.group_size, config.skip) == (8, 32, ["a", "d"])
    assert list(config.overrides.items()) == [("c", "float"), ("e", {"bits": 4}), ("b", "float")]


def test_no_flags_are_the_default_config() -> None:
    assert build_config(None, bits=None, grid=None) == HfQuantConfig()


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("int4", "int4 sym g32"),
        ("int4-asym", "int4 asym g32"),
        ("int8", "int8 sym g128"),
        ("nf4", "nf4 g64 dq"),
        ("mixed", "int4 sym g32"),
    ],
)
def test_shipped_recipes_are_valid(name: str, label: str) -> None:
    config = build_config(CONFIGS / f"{name}.yaml")
    assert config.default.scheme.label == label
    assert HfQuantConfig(**config.to_dict()) == config


def test_every_shipped_recipe_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"int4", "int4-asym", "int8", "nf4", "mixed"}


def test_the_mixed_recipe_does_what_its_comments_say(tiny_model) -> None:
    from hf_quant.plan import make_plan

    plan = make_plan(tiny_model("llama"), build_config(CONFIGS / "mixed.yaml"))
    labels = {layer.name: layer.scheme.label if layer.scheme else "float" for layer in plan.layers}
    assert {label for name, label in labels.items() if name.startswith("model.layers.0.")} == {"float"}
    assert labels["model.layers.1.mlp.down_proj"] == "int8 sym g64"
    assert labels["model.layers.1.self_attn.v_proj"] == "int4 asym g32"
    assert labels["model.layers.1.self_attn.q_proj"] == "int4 sym g32"


@pytest.mark.parametrize(
    "content", ["bits: [", "- bits", "bits: 5", "bitz: 4", "bits: 4\ngrid: nf4\nsymmetric: false\n"]
)
def test_a_bad_recipe_is_one_typed_error(tmp_path: Path, content: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError):
        build_config(recipe)
