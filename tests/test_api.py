"""The Python interface: a model in memory or a directory in, a whole checkpoint out or nothing, and a Hub behind it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.checkpoint import check_directory, read_manifest, verify_manifest
from hf_quant.errors import (
    CheckpointError,
    ConfigError,
    FormatError,
    KernelError,
    OutputExistsError,
    PlanError,
    WeightError,
)
from hf_quant.nn.linear import QuantLinear
from hf_quant.nn.swap import quantized_modules

IDS = torch.arange(3, 27).view(2, 12)


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def _weights(model) -> dict[str, list[torch.Tensor]]:
    return {name: [*layer.quantized().tensors()] for name, layer in quantized_modules(model)}


def _assert_same(one, other) -> None:
    first, second = _weights(one), _weights(other)
    assert first.keys() == second.keys() and first
    for name, tensors in first.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, second[name], strict=True)), name


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory) -> Path:
    """An int4 checkpoint made from a directory; read only."""
    path = tmp_path_factory.mktemp("api") / "int4"
    hf_quant.quantize(tiny_llama, HfQuantConfig(method="absmax"), path)
    return path


def test_a_directory_and_a_model_in_memory_give_the_same(tiny_llama, tiny_tokenizer, checkpoint, tmp_path) -> None:
    config = HfQuantConfig(method="absmax")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    returned = hf_quant.quantize(model, config, tmp_path / "out", tokenizer=tiny_tokenizer)
    assert returned is model
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    _assert_same(model, hf_quant.load(checkpoint))
    assert torch.equal(_logits(model), _logits(hf_quant.load(tmp_path / "out")))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes(), name


def test_the_checkpoint_is_whole_and_says_where_it_comes_from(checkpoint, tiny_llama) -> None:
    check_directory(checkpoint)
    verify_manifest(checkpoint)
    manifest = read_manifest(checkpoint)
    settings = json.loads((checkpoint / "config.json").read_text())
    assert manifest.provenance == settings["hf_quant"]
    assert settings["hf_quant"]["base_model"] == tiny_llama.name  # the folder's name, not its path
    assert str(tiny_llama.parent) not in (checkpoint / "config.json").read_text()
    assert settings["hf_quant"]["recipe"]["method"] == "absmax"
    assert {row["label"] for row in manifest.plan} == {"int4 sym g32", None}


def test_saving_again_changes_nothing(checkpoint, tmp_path) -> None:
    model = hf_quant.load(checkpoint)
    _logits(model)
    hf_quant.save(model, tmp_path / "again", side_files=checkpoint)
    verify_manifest(tmp_path / "again")
    for file in checkpoint.iterdir():
        if file.name != "hf_quant.json":
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    assert read_manifest(tmp_path / "again").plan == read_manifest(checkpoint).plan
    assert read_manifest(tmp_path / "again").provenance == read_manifest(checkpoint).provenance


def test_loading_arguments(checkpoint) -> None:
    model = hf_quant.load(checkpoint, device="cpu", dtype="bfloat16", kernel="reference")
    assert _logits(model).dtype == torch.bfloat16
    reports = hf_quant.inspect_model(model)
    assert len(reports) == 14
    assert {report.kernel for report in reports} == {"reference"}
    first = reports[0]
    assert (first.name, first.shape, first.label) == ("model.layers.0.self_attn.q_proj", (64, 64), "int4 sym g32")
    assert first.nbytes == 64 * 32 + 64 * 2 * 2
    assert "asked for" in (first.reason or "")


def test_float_modules_are_not_touched(tiny_llama) -> None:
    original = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = hf_quant.quantize(tiny_llama, HfQuantConfig(method="absmax", skip=["o_proj"]))
    for name, parameter in original.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, QuantLinear):
            assert torch.equal(model.get_parameter(name), parameter), name
    assert isinstance(model.lm_head, nn.Linear)


def test_an_encoder_keeps_its_class(tmp_path) -> None:
    settings = BertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    BertModel(settings).save_pretrained(tmp_path / "float")
    model = hf_quant.quantize(tmp_path / "float", HfQuantConfig(bits=8), tmp_path / "out")
    loaded = hf_quant.load(tmp_path / "out")
    assert type(loaded) is BertModel
    assert len(_weights(loaded)) == 6
    _assert_same(model, loaded)


def test_no_tensor_is_read_when_the_output_exists(tiny_llama, checkpoint) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    with pytest.raises(OutputExistsError):
        hf_quant.quantize(tiny_llama, HfQuantConfig(), checkpoint)
    assert {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()} == before


def test_overwriting_replaces_the_whole_checkpoint(tiny_llama, tmp_path) -> None:
    out = tmp_path / "out"
    hf_quant.quantize(tiny_llama, HfQuantConfig(method="absmax"), out)
    hf_quant.quantize(tiny_llama, HfQuantConfig(grid="nf4", method="absmax"), out, overwrite=True)
    verify_manifest(out)
    assert {report.label for report in hf_quant.inspect_model(hf_quant.load(out))} == {"nf4 g64 dq"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_weight_that_is_not_finite_leaves_nothing(in_memory, value, tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    source = tmp_path / "float"
    model.save_pretrained(source)
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.up_proj"):
        hf_quant.quantize(model if in_memory else source, HfQuantConfig(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]
    assert not list(quantized_modules(model)), "the model in memory was changed"


def test_what_the_format_cannot_hold_is_refused_before_the_work(tiny_checkpoint, tmp_path) -> None:
    source = tiny_checkpoint("gpt2")
    with pytest.raises(FormatError, match="Conv1D"):
        hf_quant.quantize(source, HfQuantConfig(), tmp_path / "out")
    model = hf_quant.quantize(source, HfQuantConfig(method="absmax"))
    with pytest.raises(FormatError, match="Conv1D"):
        hf_quant.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    hf_quant.quantize(source, HfQuantConfig(grid="nf4", method="absmax"), tmp_path / "out")
    assert len(_weights(hf_quant.load(tmp_path / "out"))) == 8


def test_wrong_sources(tiny_llama, checkpoint, tmp_path) -> None:
    config = HfQuantConfig()
    with pytest.raises(CheckpointError, match="quantized already"):
        hf_quant.quantize(checkpoint, config)
    with pytest.raises(ConfigError, match="quantized already"):
        hf_quant.quantize(hf_quant.load(checkpoint), config)
    with pytest.raises(ConfigError, match="not a transformers model"):
        hf_quant.quantize(nn.Linear(32, 32), config)
    for source in (tmp_path / "nowhere", tiny_llama / "config.json"):
        for call in (hf_quant.quantize, hf_quant.load):
            with pytest.raises(CheckpointError, match="not a directory"):
                call(source)
    with pytest.raises(CheckpointError):
        hf_quant.quantize(tmp_path)  # empty
    with pytest.raises(CheckpointError, match="no layer that our runtime"):
        hf_quant.load(tiny_llama)
    with pytest.raises(CheckpointError, match="not quantized"):
        hf_quant.save(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "out")
    with pytest.raises(ConfigError, match="not a kernel"):
        hf_quant.load(checkpoint, kernel="fast")
    with pytest.raises(KernelError, match=r"model\.layers\.0"):
        hf_quant.load(checkpoint, kernel="bitsandbytes", device="cpu")


def test_an_architecture_that_transformers_lacks(tiny_llama, tmp_path) -> None:
    path = shutil.copytree(tiny_llama, tmp_path / "copy")
    settings = json.loads((path / "config.json").read_text())
    settings["architectures"] = ["NovelForCausalLM"]
    (path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(PlanError, match="NovelForCausalLM"):
        hf_quant.quantize(path, HfQuantConfig(), tmp_path / "out")


def test_a_truncated_shard_is_an_error(tiny_llama, checkpoint, tmp_path) -> None:
    for call, source in ((hf_quant.quantize, tiny_llama), (hf_quant.load, checkpoint)):
        path = shutil.copytree(source, tmp_path / source.name)
        shard = path / "model.safetensors"
        shard.write_bytes(shard.read_bytes()[:-10])
        with pytest.raises(CheckpointError, match="truncated"):
            call(path)


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_tensor_that_is_not_there_is_an_error(lost, tiny_llama, tmp_path) -> None:
    path = shutil.copytree(tiny_llama, tmp_path / "copy")
    tensors = load_file(path / "model.safetensors")
    del tensors[lost]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=lost):
        hf_quant.quantize(path, HfQuantConfig(method="absmax"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


_PUSH = """
import sys, torch
import hf_quant
from hf_quant.nn.swap import quantized_modules
from transformers import AutoModelForCausalLM
model = hf_quant.load(sys.argv[1])
model.push_to_hub("org/tiny-int4")
back = AutoModelForCausalLM.from_pretrained("org/tiny-int4")
pairs = list(zip(quantized_modules(model), quantized_modules(back), strict=True))
assert pairs
for (name, one), (other, two) in pairs:
    assert name == other and torch.equal(one.quantized().packed, two.quantized().packed)
ids = torch.arange(3, 27).view(2, 12)
with torch.no_grad():
    assert torch.equal(model(ids).logits, back(ids).logits)
again = hf_quant.load("org/tiny-int4")
assert again.config.hf_quant == model.config.hf_quant
hf_quant.save(again, sys.argv[2])
"""


def _loopback():
    spec = importlib.util.spec_from_file_location("loopback_hub_api", Path(__file__).with_name("loopback_hub.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loopback_hub_api"] = module
    spec.loader.exec_module(module)
    return module


def _with_hub(loopback, url: str, home: Path, code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own: huggingface_hub reads these variables when it is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_TOKEN": loopback.WRITE_TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
    }
    command = [sys.executable, "-c", code, *map(str, paths)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_push_to_hub_and_back(checkpoint, tmp_path) -> None:
    loopback = _loopback()
    with loopback.running() as (url, hub):
        done = _with_hub(loopback, url, tmp_path / "home", _PUSH, checkpoint, tmp_path / "saved")
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.repos["org/tiny-int4"].files()
    assert files["model.safetensors"].content == (checkpoint / "model.safetensors").read_bytes()
    verify_manifest(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == files["model.safetensors"].content


_FROM_HUB = """
import sys, hf_quant
from huggingface_hub import HfApi
HfApi().create_repo("org/tiny-float")
HfApi().upload_folder(repo_id="org/tiny-float", folder_path=sys.argv[1])
hf_quant.quantize("org/tiny-float", hf_quant.HfQuantConfig(method="absmax"), sys.argv[2])
"""


def test_a_hub_id_brings_its_tokenizer_its_licence_and_its_revision(tiny_llama, tmp_path) -> None:
    source = tmp_path / "float"
    shutil.copytree(tiny_llama, source)
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# Tiny\n")
    loopback = _loopback()
    with loopback.running() as (url, _):
        done = _with_hub(loopback, url, tmp_path / "home", _FROM_HUB, source, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    provenance = read_manifest(tmp_path / "out").provenance
    assert provenance["base_model"] == "org/tiny-float" and len(provenance["base_revision"]) == 40
    assert provenance["base_card"] == {"license": "mit", "language": ["en"]}
    assert provenance["base_model_is_local"] is False
    side = {path.name for path in source.iterdir()} & {"tokenizer.json", "tokenizer_config.json"}
    assert side and all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in side)
