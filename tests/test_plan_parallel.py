"""Plans split over several devices: what each device gets, and what does not divide, against shards that are cut."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig
from typer.testing import CliRunner

from hf_quant.cli import app
from hf_quant.config import HfQuantConfig
from hf_quant.errors import PlanError
from hf_quant.plan import make_plan
from hf_quant.plan_parallel import Parallel, split_plan

SIZES = {"vocab_size": 384, "hidden_size": 256, "intermediate_size": 192, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}


def _split(devices: int, settings=None, **keys) -> Parallel:
    settings = settings or LlamaConfig(**SIZES, **HEADS)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    return split_plan(make_plan(model, HfQuantConfig(**keys)), settings, devices)


def test_shards_of_a_llama() -> None:
    split = _split(2, overrides={"lm_head": {"bits": 8}})
    assert not split.misfits and not split.heads and not split.note
    shapes = {layer.name.removeprefix("model.layers.1."): (layer.role, layer.shape) for layer in split.layers[7:]}
    assert shapes == {
        "self_attn.q_proj": ("column", (128, 256)),
        "self_attn.k_proj": ("column", (64, 256)),
        "self_attn.v_proj": ("column", (64, 256)),
        "self_attn.o_proj": ("row", (256, 128)),
        "mlp.gate_proj": ("column", (96, 256)),
        "mlp.up_proj": ("column", (96, 256)),
        "mlp.down_proj": ("row", (256, 96)),
    }


def test_a_group_that_straddles_two_devices_is_named_with_one_that_does_not() -> None:
    split = _split(2, group_size=64)
    assert {layer.name.rsplit(".", 1)[-1] for layer in split.misfits} == {"down_proj"}
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.down_proj .* over 2 devices.* 96 columns .* of 64 \(2 such"):
        split.require_fit()
    assert {layer.fix for layer in split.misfits} == {32}
    _split(2, group_size=64, overrides={"down_proj": {"group_size": 32}}).require_fit()
    _split(2, group_size=-1).require_fit()  # one scale per row is the same on every device


def test_zero_points_are_packed_along_the_rows() -> None:
    settings = LlamaConfig(**SIZES, **HEADS, head_dim=4)
    _split(4, settings, group_size=8).require_fit()
    split = _split(4, settings, group_size=8, symmetric=False)  # 4 rows of k and v on a device, 8 zero points in a word
    assert {layer.name.rsplit(".", 1)[-1] for layer in split.misfits} == {"k_proj", "v_proj"}
    with pytest.raises(PlanError, match="zero points of 4 rows"):
        split.require_fit()


def test_heads() -> None:
    assert "3" in _split(3).heads
    split = _split(8)
    assert not split.heads and split.note.startswith("4 key-value heads: each is copied to 2")
    assert next(layer.shape for layer in split.layers if "k_proj" in layer.name) == (32, 256)
    odd = LlamaConfig(**(SIZES | {"hidden_size": 384}), num_attention_heads=12, num_key_value_heads=4)
    with pytest.raises(PlanError, match="4 key-value heads"):
        _split(6, odd).require_fit()


def test_experts_are_split_like_the_layer_that_they_stand_for() -> None:
    split = _split(2, MixtralConfig(**SIZES, **HEADS, num_local_experts=4))
    roles = {
        layer.name.split("experts.3.")[-1]: layer.role for layer in split.layers if "1.mlp.experts.3." in layer.name
    }
    assert set(roles.values()) == {"column", "row"}
    assert all((role == "row") == ("down" in name or name == "w2") for name, role in roles.items())


@pytest.mark.parametrize(("kind", "rows"), [("gpt2", {"c_proj"}), ("opt", {"out_proj", "fc2"})])
def test_models_without_a_plan_of_their_own(tiny_model, kind, rows) -> None:
    model = tiny_model(kind)
    split = split_plan(make_plan(model, HfQuantConfig()), model.config, 2)
    assert {layer.name.rsplit(".", 1)[-1] for layer in split.layers if layer.role == "row"} == rows


def test_refusals() -> None:
    with pytest.raises(PlanError, match="at least 2"):
        _split(1)
    with pytest.raises(PlanError, match="bitsandbytes"):
        _split(2, grid="nf4")


def test_command(tmp_path) -> None:
    settings = LlamaConfig(**SIZES, **HEADS)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path)
    run = CliRunner()
    fits = run.invoke(app, ["plan", str(tmp_path), "--tensor-parallel", "2", "--json"])
    assert fits.exit_code == 0
    assert len(json.loads(fits.stdout)["tensor_parallel"]["layers"]) == 14
    fails = run.invoke(app, ["plan", str(tmp_path), "--group-size", "64", "--tensor-parallel", "2"])
    assert fails.exit_code == 2
    assert "--override down_proj=group_size=32" in fails.stderr
    assert "not whole groups of 64" in fails.stdout
