"""Calibrated runs from end to end: saved, reloaded, killed and resumed, in little memory, and recorded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.api import journal_beside
from hf_quant.calibration import from_batches, load_calibration
from hf_quant.checkpoint import read_manifest
from hf_quant.errors import CalibrationError, CheckpointError, ConfigError, OutputExistsError, WeightError
from hf_quant.integrations.calibrated import Session
from hf_quant.integrations.shell import Absent, FileWeights, ModelWeights, open_shell
from hf_quant.nn.forwards import StandIn
from hf_quant.nn.swap import quantized_modules
from hf_quant.plan import make_plan

IDS = torch.arange(3, 27).view(2, 12)
QUICK = {"samples": 6, "length": 24}
TUNING = {"steps": 4, "learning_rate": 1e-3, "batch": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("".join(f"{n} quick brown foxes jump over {n * n} lazy dogs. " for n in range(200)))
    return path


@pytest.fixture
def stock_runtime():
    hf_quant.disable()
    yield
    hf_quant.enable()


def balanced(text: Path, **keys) -> HfQuantConfig:
    return HfQuantConfig(**{"preset": "balanced", "calibration": {"source": str(text), **QUICK}, **keys})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same_layers(one, other) -> bool:
    first, second = dict(quantized_modules(one)), dict(quantized_modules(other))
    assert first and first.keys() == second.keys()
    return all(
        torch.equal(a, b)
        for name, layer in first.items()
        for a, b in zip(layer.quantized().tensors(), second[name].quantized().tensors(), strict=True)
    )


@pytest.fixture(scope="module")
def saved(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory):
    """(model, directory, what the callbacks heard) of a balanced run; read only."""
    out = tmp_path_factory.mktemp("saved") / "out"
    heard: dict[str, list] = {"data": [], "layer": []}
    session = Session(on_data=heard["data"].append, on_layer=heard["layer"].append)
    model = hf_quant.quantize(tiny_llama, balanced(text), out, session=session)
    return model, out, heard


# --- what comes out ---


def test_what_was_saved_comes_back(saved) -> None:
    model, out, _ = saved
    again = hf_quant.load(out)
    assert same_layers(model, again)
    assert torch.equal(logits(again), logits(model))


def test_stock_transformers_loads_it(saved, stock_runtime) -> None:
    model, out, _ = saved
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert not list(quantized_modules(stock))
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=0.02)


def test_the_record_says_what_it_was_calibrated_on_and_how_well(saved, text: Path) -> None:
    model, out, heard = saved
    manifest = read_manifest(out)
    (data,) = heard["data"]
    provenance = json.loads((out / "config.json").read_text())["hf_quant"]
    assert provenance["data"] == data.record()
    assert provenance["data"]["source"] == f"file:{text.name}" and provenance["data"]["samples"] == QUICK["samples"]
    assert provenance["data"]["tokens"] == QUICK["samples"] * QUICK["length"]
    assert provenance["method"] == "gptq" and provenance["recipe"]["preset"] == "balanced"
    rows = {row["name"]: row for row in manifest.plan if row["label"]}
    assert set(rows) == {name for name, _ in quantized_modules(model)}
    for step in heard["layer"]:
        row = rows[step.result.name]
        assert row["method"] == "gptq" and row["tokens"] == data.tokens
        assert row["error"] == pytest.approx(step.result.error) and 0 < row["error"] < 0.1
    assert [step.done for step in heard["layer"]] == list(range(1, len(rows) + 1))
    assert not journal_beside(out).exists()
    # a checkpoint that is loaded and saved again keeps the record
    again = hf_quant.load(out)
    assert again.config.hf_quant["data"] == data.record()


def test_calibration_data_may_be_given_as_it_is(saved, tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    data = load_calibration(str(text), directory=tiny_llama, **QUICK)
    model = hf_quant.quantize(tiny_llama, HfQuantConfig(preset="balanced"), calibration=data)
    assert same_layers(model, saved[0])
    with pytest.raises(ConfigError, match="method=search uses none"):
        hf_quant.quantize(tiny_llama, HfQuantConfig(), calibration=data)


def test_from_pretrained(saved, tiny_llama: Path, text: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=balanced(text))
    assert same_layers(model, saved[0])
    assert torch.equal(logits(model), logits(saved[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_memory_as_from_files(dtype: torch.dtype, tiny_checkpoint, text: Path) -> None:
    source = tiny_checkpoint("llama", dtype=dtype)
    config = balanced(text, tuning=TUNING)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    plain.train()
    inner = hf_quant.quantize(plain, config, tokenizer=AutoTokenizer.from_pretrained(source))
    assert inner.training and inner.dtype == dtype
    outer = hf_quant.quantize(source, config)
    assert same_layers(inner, outer)
    assert torch.equal(logits(inner.eval()), logits(outer))
    assert inner.config.hf_quant["data"] == outer.config.hf_quant["data"]
    forwards = [vars(module)["forward"] for module in inner.modules() if "forward" in vars(module)]
    assert all(isinstance(forward, StandIn) for forward in forwards)  # those of the kernels


def test_calibrated_is_closer_to_the_float_model_than_data_free(tiny_llama: Path) -> None:
    exact = AutoModelForCausalLM.from_pretrained(tiny_llama)
    # random tokens: the built-in texts differ between releases of Python
    rows = torch.randint(3, 380, (72, 64), generator=torch.Generator().manual_seed(0))
    data = from_batches([{"input_ids": part} for part in rows[:64].split(4)])
    ids = rows[64:]
    errors = {}
    for preset, extra in (("fast", {}), ("balanced", {"calibration": data})):
        model = hf_quant.quantize(tiny_llama, HfQuantConfig(preset=preset), **extra)
        with torch.no_grad():
            errors[preset] = float((model(ids).logits - exact(ids).logits).square().sum())
    assert errors["balanced"] < 0.6 * errors["fast"]


@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [
        ("gpt2", {"grid": "nf4"}),
        ("opt", {"symmetric": False, "overrides": {"fc2": {"bits": 8}}}),
        ("qwen3", {"overrides": {"down_proj": {"method": "absmax"}, "re:.*layers.0.*q_proj": "float"}}),
    ],
)
def test_other_architectures_and_recipes(architecture, recipe, tiny_checkpoint, text: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint(architecture)
    model = hf_quant.quantize(source, balanced(text, tuning=TUNING, **recipe), tmp_path / "out")
    again = hf_quant.load(tmp_path / "out")
    assert same_layers(model, again) and torch.equal(logits(again), logits(model))
    assert torch.isfinite(logits(model)).all()
    if architecture == "qwen3":
        methods = {row["name"]: row["method"] for row in read_manifest(tmp_path / "out").plan if row["label"]}
        assert methods["model.layers.1.mlp.down_proj"] == "absmax" and "model.layers.0.self_attn.q_proj" not in methods


def vectors(path: Path) -> dict[str, torch.Tensor]:
    """Norms and biases of a checkpoint."""
    found = load_file(path / "model.safetensors")
    return {name: value for name, value in found.items() if name.endswith((".bias", "norm.weight"))}


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_folds_are_in_the_checkpoint(architecture, tiny_checkpoint, text: Path, tmp_path: Path, stock_runtime) -> None:
    source = tiny_checkpoint(architecture)
    exact = logits(AutoModelForCausalLM.from_pretrained(source))
    hf_quant.enable()
    errors = {}
    for fold in (True, False):
        out = tmp_path / str(fold)
        config = balanced(text, calibration={"source": str(text), **QUICK, "fold": fold})
        model = hf_quant.quantize(source, config, out)
        assert same_layers(model, hf_quant.load(out)) and torch.equal(logits(model), logits(hf_quant.load(out)))
        errors[fold] = float((logits(model) - exact).square().sum())
        before, after = vectors(source), vectors(out)
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed if fold else not changed
        assert all(".layers." in name for name in changed)
        hf_quant.disable()
        stock = AutoModelForCausalLM.from_pretrained(out)
        assert not list(quantized_modules(stock))
        torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=0.02)
        hf_quant.enable()
    assert 0 < errors[True] < 2 * errors[False]


def test_shards_give_the_same(saved, tiny_checkpoint, text: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", shard="200KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    hf_quant.quantize(source, balanced(text), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (saved[1] / "model.safetensors").read_bytes()


# --- the shell ---


def test_the_shell_reads_weights_one_at_a_time(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    plan = make_plan(model, HfQuantConfig())
    shell, weights = open_shell(tiny_llama, type(model), plan)
    assert isinstance(weights, FileWeights)
    for layer in plan.quantized:
        assert isinstance(shell.get_submodule(layer.name), Absent)
        assert torch.equal(weights.weight(layer), model.get_parameter(f"{layer.name}.weight"))
    held = dict(shell.named_parameters())
    assert not set(held) & {f"{layer.name}.weight" for layer in plan.quantized}
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in held.items())
    assert shell.dtype == torch.float32 and not hasattr(shell, "hf_quantizer")


def test_a_conv1d_is_turned_round(tiny_checkpoint) -> None:
    source = tiny_checkpoint("gpt2")
    model = AutoModelForCausalLM.from_pretrained(source)
    plan = make_plan(model, HfQuantConfig())
    shell, weights = open_shell(source, type(model), plan)
    layer = plan.quantized[0]
    expected = model.get_parameter(f"{layer.name}.weight").t()
    assert weights.weight(layer).shape == layer.shape == expected.shape
    for found in (weights, ModelWeights(model)):
        assert torch.equal(found.weight(layer), expected) and found.weight(layer).is_contiguous()
    bias = shell.get_submodule(layer.name).bias
    assert torch.equal(bias, model.get_submodule(layer.name).bias)


def test_names_that_are_not_the_model_s_make_it_load_the_whole(saved, tiny_llama: Path, text: Path, tmp_path) -> None:
    """The key names of an old layout, which transformers converts while it loads."""
    source = tmp_path / "old"
    shutil.copytree(tiny_llama, source)
    state = load_file(source / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight_of_old"] = state.pop("model.layers.0.mlp.up_proj.weight")
    save_file(state, source / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    plan = make_plan(model, HfQuantConfig())
    shell, weights = open_shell(source, type(model), plan)
    assert isinstance(weights, ModelWeights)
    assert not any(isinstance(module, Absent) for module in shell.modules())
    layer = plan.quantized[0]
    assert torch.equal(weights.weight(layer), model.get_parameter(f"{layer.name}.weight"))


# --- killed and resumed ---

_CHILD = """
import json, os, signal, sys
import torch
job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
import hf_quant
from hf_quant.integrations.calibrated import Session
def layer(step):
    if step.done == job.get("layer"):
        os.kill(os.getpid(), signal.SIGKILL)
def tuning(step):
    if step.step == job.get("step"):
        os.kill(os.getpid(), signal.SIGKILL)
session = Session(on_layer=layer, on_tuning=tuning)
hf_quant.quantize(job["model"], hf_quant.HfQuantConfig(**job["config"]), job["out"], session=session)
"""


def killed(**job) -> None:
    job["threads"] = torch.get_num_threads()
    done = subprocess.run([sys.executable, "-c", _CHILD, json.dumps(job)], capture_output=True, text=True, timeout=300)
    assert done.returncode == -9, done.stderr


def test_killed_twice_and_resumed_it_ends_with_the_same_bytes(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    config = balanced(text, tuning=TUNING)
    recipe = {"preset": "balanced", "calibration": {"source": str(text), **QUICK}, "tuning": TUNING}
    whole, out = tmp_path / "whole", tmp_path / "out"
    hf_quant.quantize(tiny_llama, config, whole)

    job = {"model": str(tiny_llama), "config": recipe, "out": str(out)}
    killed(**job, layer=10)  # in the middle of the second of two blocks of seven layers
    journal = journal_beside(out)
    assert not out.exists() and len(list(journal.glob("unit-*"))) == 1

    # nothing else goes on with it
    before = sorted(p.name for p in journal.iterdir())
    for other, named in (
        (HfQuantConfig(**{**recipe, "group_size": 64}), "config"),
        (HfQuantConfig(**{**recipe, "calibration": {**recipe["calibration"], "length": 16}}), "data"),
    ):
        with pytest.raises(CheckpointError, match=rf"of another .*{named}"):
            hf_quant.quantize(tiny_llama, other, out)
    changed = tmp_path / "changed"
    shutil.copytree(tiny_llama, changed)
    settings = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match="of another model"):
        hf_quant.quantize(changed, config, out)
    assert sorted(p.name for p in journal.iterdir()) == before

    killed(**job, step=2)  # all layers are there now, and tuning has begun
    assert not out.exists() and len(list(journal.glob("unit-*"))) == 3  # two blocks, and the norms

    steps: list = []
    hf_quant.quantize(tiny_llama, config, out, session=Session(on_layer=steps.append))
    assert not steps  # the walk is over
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for name in ("config.json", "hf_quant.json"):
        if (whole / name).exists():
            assert json.loads((out / name).read_text()) == json.loads((whole / name).read_text())
    assert not journal.exists() and not journal_beside(whole).exists()
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_run_that_failed_is_resumed_where_it_stopped(saved, tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(step) -> None:
        if step.done == 8:
            raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        hf_quant.quantize(tiny_llama, balanced(text), out, session=Session(on_layer=stop))
    steps: list = []
    model = hf_quant.quantize(tiny_llama, balanced(text), out, session=Session(on_layer=steps.append))
    assert [step.resumed for step in steps] == [True] * 7 + [False] * 7
    assert [step.done for step in steps] == list(range(1, 15))
    assert same_layers(model, saved[0])
    rows = [[row for row in read_manifest(path).plan if row["label"]] for path in (out, saved[1])]
    assert rows[0] == rows[1]


def test_stopped_between_blocks_it_ends_with_the_same_bytes(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(step) -> None:
        raise Stop

    config = balanced(text, tuning={**TUNING, "steps": 2, "block_steps": 4})
    whole, out = tmp_path / "whole", tmp_path / "out"
    blocks: list = []
    hf_quant.quantize(tiny_llama, config, whole, session=Session(on_block=blocks.append))
    assert [block.done for block in blocks] == [1, 2] and all(block.after <= block.before for block in blocks)
    with pytest.raises(Stop):
        hf_quant.quantize(tiny_llama, config, out, session=Session(on_block=stop))
    heard: list = []
    hf_quant.quantize(tiny_llama, config, out, session=Session(on_layer=heard.append, on_block=heard.append))
    assert [block.block for block in heard] == ["model.layers.1"]
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_loading_attributes_do_not_make_it_another_run(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    def stop(step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf_quant.quantize(tiny_llama, balanced(text), tmp_path / "out", session=Session(on_layer=stop))
    hf_quant.quantize(tiny_llama, balanced(text, kernel="reference"), tmp_path / "out")


# --- memory ---

_MEMORY = """
import sys
import torch
torch.set_num_threads(1)
import hf_quant
from transformers import AutoModelForCausalLM, AutoConfig
from hf_quant.calibration.data import CalibrationData
from hf_quant.integrations.calibrated import Session, run_on_files, session
from hf_quant.plan import make_plan
from transformers import LlamaForCausalLM
from pathlib import Path
def peak():  # not ru_maxrss: a new process begins with its parent's
    return 1024 * int(next(l for l in Path("/proc/self/status").open() if l.startswith("VmHWM")).split()[1])
source, place = sys.argv[1:]
some = {"re:.*layers.0.*(q|o)_proj": {"method": "gptq"}}  # the rest without data: this is about memory, not time
config = hf_quant.HfQuantConfig(method="absmax", overrides=some, group_size=64)
with torch.device("meta"):
    plan = make_plan(LlamaForCausalLM(AutoConfig.from_pretrained(source)), config)
batches = [{"input_ids": torch.arange(3, 67).view(1, 64) + i} for i in range(2)]
data = CalibrationData.make(batches, "numbers", 0)
torch.linalg.cholesky_ex(torch.eye(64))
before = peak()
with session(Session(data=data, journal=Path(place))):
    done = run_on_files(source, LlamaForCausalLM, plan, config)
grown = peak() - before
print(len(done.journal), len(plan.quantized), grown, sum(4 * layer.numel for layer in plan.quantized))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_float_model_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    settings = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 4,
        "vocab_size": 256,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings), dtype=torch.bfloat16)
    source = tmp_path / "model"
    piece = torch.randn(2048 * 512).to(torch.bfloat16) * 0.02  # the same numbers everywhere will do
    state = {
        name: piece[: p.numel()].view(p.shape).clone() if p.dim() > 1 else torch.ones(p.shape, dtype=p.dtype)
        for name, p in model.named_parameters()
    }
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(source)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(source), str(tmp_path / "journal")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    finished, planned, grown, floats = map(int, done.stdout.split())
    assert finished == planned == 24 * 7
    assert floats > 4e8
    assert grown < floats / 2, f"{grown / 2**20:.0f} MiB for {floats / 2**20:.0f} MiB of weights"


# --- bad input ---


def test_a_weight_that_is_not_a_number_is_named(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_llama, source)
    state = load_file(source / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.up_proj"):
        hf_quant.quantize(source, balanced(text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_that_does_not_fit_is_refused_and_the_model_in_memory_stays(tiny_model) -> None:
    from hf_quant.calibration.data import CalibrationData

    model = tiny_model("llama")
    before = logits(model)
    data = CalibrationData.make([{"input_ids": torch.full((2, 12), 5000)}], "wrong", 0)
    with pytest.raises(CalibrationError, match="LlamaForCausalLM does not run on the calibration data \\(wrong\\)"):
        hf_quant.quantize(model, HfQuantConfig(preset="balanced"), calibration=data)
    assert torch.equal(logits(model), before)
    assert not list(quantized_modules(model))
    assert model.config.use_cache is True


def test_an_output_that_exists_is_refused_before_the_work(saved, tiny_llama: Path, text: Path) -> None:
    heard: list = []
    with pytest.raises(OutputExistsError):
        hf_quant.quantize(tiny_llama, balanced(text), saved[1], session=Session(on_data=heard.append))
    assert not heard


def test_calibration_without_a_tokenizer_says_what_is_missing(tiny_model) -> None:
    with pytest.raises(CalibrationError, match="Fix: "):
        hf_quant.quantize(tiny_model("llama"), HfQuantConfig(preset="balanced"))
