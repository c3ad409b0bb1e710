"""Converting between formats: every weight is what it was, or the layer is named and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.checkpoint import verify_manifest
from hf_quant.cli import app
from hf_quant.convert import NAMES, TARGETS, convert
from hf_quant.errors import CheckpointError, ConfigError, FormatError, OutputExistsError
from hf_quant.nn.swap import quantized_modules

IDS = torch.arange(3, 27).view(2, 12)
RECIPES = {
    "int4": {"scale_dtype": "float16"},
    "int4-asym": {"symmetric": False, "scale_dtype": "float16"},
    "int4-channel": {"group_size": -1},
    "int8": {"bits": 8, "group_size": 64},
    "nf4": {"grid": "nf4", "group_size": 32},
    "mixed": {"overrides": {"down_proj": {"bits": 8}}},
}


@pytest.fixture(scope="module")
def quantized(tiny_llama, tmp_path_factory):
    """``quantized(recipe)``: the directory of a quantized tiny Llama; read only."""
    made: dict[str, Path] = {}

    def make(recipe: str) -> Path:
        if recipe not in made:
            made[recipe] = tmp_path_factory.mktemp("convert") / recipe
            hf_quant.quantize(str(tiny_llama), HfQuantConfig(**RECIPES[recipe], method="absmax"), made[recipe])
        return made[recipe]

    return make


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: layer.dequantize() for name, layer in quantized_modules(hf_quant.load(path, kernel="reference"))}


def _assert_same(one: Path, other: Path) -> None:
    first, second = _weights(one), _weights(other)
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("recipe", "route"),
    [
        ("int4", ["gptq", "awq", "compressed-tensors"]),
        ("int4-asym", ["awq", "gptq", "compressed-tensors"]),
        ("int4-channel", ["gptq", "compressed-tensors"]),
        ("int8", ["gptq", "compressed-tensors"]),
        ("nf4", ["bitsandbytes"]),
    ],
)
def test_there_and_back_changes_nothing(recipe, route, quantized, tmp_path) -> None:
    start = here = quantized(recipe)
    for step, target in enumerate(route):
        done = convert(here, tmp_path / f"{step}", target)
        here = tmp_path / f"{step}"
        assert done.target.startswith(target) and done.layers == 14
        settings = json.loads((here / "config.json").read_text())
        assert settings["quantization_config"]["quant_method"] == target
        assert settings["hf_quant"]["converted_from"] == done.source
        assert verify_manifest(here).ok and (here / "tokenizer.json").is_file()
        _assert_same(start, here)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(start)(IDS).logits
        found = AutoModelForCausalLM.from_pretrained(here)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_zero_points_of_zero_are_beyond_version_1(quantized, tmp_path) -> None:
    source = hf_quant.load(quantized("int4-asym"), kernel="reference")
    has_zero = any(bool((layer.weight_zero_point == 0).any()) for _, layer in quantized_modules(source))
    layer = next(layer for _, layer in quantized_modules(source))
    layer.weight_zero_point.data[0, 0] = 0
    hf_quant.save(source, tmp_path / "zero")
    assert convert(tmp_path / "zero", tmp_path / "out", "gptq").target == "gptq_v2"
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["checkpoint_format"]
        == "gptq_v2"
    )
    _assert_same(tmp_path / "zero", tmp_path / "out")
    if not has_zero:
        assert convert(quantized("int4-asym"), tmp_path / "v1", "gptq").target == "gptq"


@pytest.mark.parametrize(
    ("recipe", "target", "match"),
    [
        ("nf4", "gptq", r"model\.layers\.0\.\S+ cannot be converted: gptq holds integers, not nf4"),
        ("nf4", "compressed-tensors", "holds integers, not nf4"),
        ("int4", "bitsandbytes", "holds nf4 and fp4, not int4"),
        ("int8", "awq", "awq holds int4, not int8 sym g64"),
        ("mixed", "gptq", r"down_proj is int8 sym \S+ and \S+ is int4 sym g32; gptq has one scheme"),
    ],
)
def test_what_does_not_fit_is_named_and_not_written(recipe, target, match, quantized, tmp_path) -> None:
    with pytest.raises(FormatError, match=match):
        convert(quantized(recipe), tmp_path / "out", target)
    assert not list(tmp_path.iterdir())


def test_scales_that_float16_does_not_have_are_refused(quantized, tmp_path) -> None:
    model = hf_quant.load(quantized("int4-channel"), kernel="reference")
    name, layer = next(iter(quantized_modules(model)))
    assert layer.weight_scale.dtype == torch.bfloat16
    layer.weight_scale.data[1, 0] = 1e-30
    hf_quant.save(model, tmp_path / "tiny-scale")
    with pytest.raises(FormatError, match=rf"{name} cannot be converted: its scale \S+e-31 is no float16 number"):
        convert(tmp_path / "tiny-scale", tmp_path / "out", "awq")


def test_bad_requests(quantized, tiny_llama, tmp_path) -> None:
    with pytest.raises(ConfigError, match="'exl2' is not a format to convert to"):
        convert(quantized("int4"), tmp_path / "out", "exl2")
    with pytest.raises(CheckpointError, match="is not quantized"):
        convert(tiny_llama, tmp_path / "out", "gptq")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    with pytest.raises(OutputExistsError):
        convert(quantized("int4"), tmp_path / "taken", "gptq")
    assert set(TARGETS) == {"compressed-tensors", "gptq", "awq", "bitsandbytes"}
    assert set(NAMES) == {*TARGETS, "executorch", "gguf", "modelopt", "onnx", "openvino"}


def test_the_command(quantized, tmp_path) -> None:
    run = CliRunner().invoke(app, ["convert", str(quantized("int4")), str(tmp_path / "out"), "--to", "awq"])
    assert run.exit_code == 0, run.output
    assert "14 layers from compressed-tensors to awq, exactly" in run.output
    refused = CliRunner().invoke(app, ["convert", str(tmp_path / "out"), str(tmp_path / "b"), "--to", "bitsandbytes"])
    assert refused.exit_code == 2
    card = CliRunner().invoke(app, ["card", str(tmp_path / "out"), "--allow-unmeasured"])
    assert card.exit_code == 0, card.output
    text = (tmp_path / "out" / "README.md").read_text()
    assert "hf-quant convert out-compressed-tensors out --to awq" in text
    assert "pip install torch transformers accelerate gptqmodel" in text and "compressed-tensors weights" not in text
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    assert "converted   from compressed-tensors" in shown.output
