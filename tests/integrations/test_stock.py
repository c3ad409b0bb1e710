"""Checkpoints that others packed: GPTQ, AWQ and int-quantized files, written here from their description."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from typer.testing import CliRunner

import hf_quant
from hf_quant.cli import app
from hf_quant.errors import DependencyError, FormatError
from hf_quant.integrations import stock
from hf_quant.nn.fused import describe_fused
from hf_quant.nn.ordered import OrderedQuantLinear
from hf_quant.nn.swap import quantized_modules

IDS = torch.arange(3, 27).view(2, 12)
SIZES = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2},
    "qwen2": {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2},  # biases on q, k and v
    "opt": {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
CASES: dict[str, dict[str, Any]] = {
    "gptq": {**GPTQ, "checkpoint_format": "gptq"},
    "gptq-act-order": {**GPTQ, "desc_act": True},  # no format: version 1
    "gptq-v2-asym": {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
    "gptq-asym-act-order": {**GPTQ, "sym": False, "desc_act": True, "group_size": 16},
    "gptq-int8-channel": {**GPTQ, "bits": 8, "group_size": -1},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
}


def _fields(codes: torch.Tensor, bits: int, places: list[int]) -> torch.Tensor:
    """int32 words along dim 0: field i of a word takes row ``places[i]`` of its ``len(places)`` rows."""
    rows = codes.to(torch.int64).view(-1, len(places), *codes.shape[1:])
    words = sum(rows[:, place] << (bits * i) for i, place in enumerate(places))
    assert isinstance(words, torch.Tensor)
    return (words & 0xFFFFFFFF).to(torch.int32)


def _pack(weight: torch.Tensor, config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The stored tensors of a weight ``[out, in]`` rounded to nearest, and the float32 weight that they stand for."""
    bits, columns = config["bits"], weight.shape[1]
    group = columns if config["group_size"] == -1 else config["group_size"]
    index = torch.arange(columns) // group
    if config.get("desc_act"):
        index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    scales, zeros = [], []
    for g in range(columns // group):
        part, top = weight[:, index == g], (1 << bits) - 1
        if config.get("sym"):
            scales.append(part.abs().amax(1) / (top / 2))
            zeros.append(torch.full_like(scales[-1], (top + 1) / 2))
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales.append((high - low) / top)
            zeros.append((-low / scales[-1]).round().clamp(0, top))
    scale, zero = torch.stack(scales).half(), torch.stack(zeros)  # [groups, out]
    codes = ((weight.t() / scale.float()[index]).round() + zero[index]).clamp(0, (1 << bits) - 1)  # [in, out]
    value = (codes - zero[index]) * scale.float()[index]
    per_word = 32 // bits
    if config["quant_method"] == "awq":
        places = [0, 2, 4, 6, 1, 3, 5, 7]
        packed = {"qweight": _fields(codes.t(), 4, places).t(), "qzeros": _fields(zero.t(), 4, places).t()}
        return {**packed, "scales": scale}, value.t()
    places = list(range(per_word))
    stored_zero = _fields(zero.t(), bits, places).t()
    if config.get("checkpoint_format", "gptq") == "gptq":
        ones = sum(1 << (bits * i) for i in range(per_word))
        stored_zero = ((stored_zero.to(torch.int64) - ones) & 0xFFFFFFFF).to(torch.int32)
    packed = {"qweight": _fields(codes, bits, places), "qzeros": stored_zero, "scales": scale}
    return {**packed, "g_idx": index.to(torch.int32)}, value.t()


def _write(out: Path, architecture: str, config: dict[str, Any]) -> Path:
    """A checkpoint in ``out``, and the float model of the same weights in ``out/../float``."""
    torch.manual_seed(1)
    settings = AutoConfig.for_model(architecture, initializer_range=0.1, **MODELS[architecture])
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.half().float()  # everything in float16 numbers
    state = model.state_dict()
    if settings.tie_word_embeddings:
        del state["lm_head.weight"]
    stored = {key: tensor.half() for key, tensor in state.items()}
    for name, module in model.named_modules():
        if any(part.isdecimal() for part in name.split(".")) and isinstance(module, (nn.Linear, Conv1D)):
            transposed = isinstance(module, Conv1D)
            weight = module.weight.data.t() if transposed else module.weight.data
            packed, value = _pack(weight.contiguous(), config)
            del stored[f"{name}.weight"]
            stored |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in packed.items()}
            module.weight.data = value.t().contiguous() if transposed else value.contiguous()
    out.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, out / "model.safetensors", {"format": "pt"})
    described = settings.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": "float16",
        "quantization_config": config,
    }
    (out / "config.json").write_text(json.dumps(described))
    model.save_pretrained(out.parent / "float")
    return out


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``stored(case, architecture)``: a stock checkpoint with its float twin beside it; read only."""
    made: dict[tuple[str, str], Path] = {}

    def make(case: str = "gptq", architecture: str = "llama") -> Path:
        if (case, architecture) not in made:
            made[case, architecture] = _write(tmp_path_factory.mktemp(case) / "packed", architecture, CASES[case])
        return made[case, architecture]

    return make


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def _load(path: Path, **kwargs: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model.eval()


PAIRS = [(case, "llama") for case in CASES]
PAIRS += [(case, a) for case in ("gptq", "gptq-act-order", "awq") for a in ("qwen2", "opt")]
PAIRS += [("gptq", "gpt2"), ("gptq-act-order", "gpt2")]


@pytest.mark.parametrize(("case", "architecture"), PAIRS, ids=lambda value: value)
def test_the_logits_are_those_of_the_same_weights_in_float(case, architecture, stored, tmp_path) -> None:
    path = stored(case, architecture)
    expected = _logits(AutoModelForCausalLM.from_pretrained(path.parent / "float"))
    model = _load(path, dtype=torch.float32)
    layers = dict(quantized_modules(model))
    assert len(layers) == {"opt": 12, "gpt2": 8}.get(architecture, 14)
    assert all(isinstance(layer, OrderedQuantLinear) == CASES[case].get("desc_act", False) for layer in layers.values())
    torch.testing.assert_close(_logits(model), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    half = _logits(_load(path))
    torch.testing.assert_close(half, expected, rtol=0, atol=0.01 * float(expected.abs().max()))

    model.save_pretrained(tmp_path / "again")
    saved, original = load_file(tmp_path / "again" / "model.safetensors"), load_file(path / "model.safetensors")
    assert saved.keys() == original.keys()
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    for key, tensor in original.items():
        same = saved[key] if key.endswith(suffixes) else saved[key].to(tensor.dtype)
        assert same.dtype == tensor.dtype and torch.equal(same, tensor), key
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert {key: config[key] for key in CASES[case]} == CASES[case]
    torch.testing.assert_close(_logits(_load(tmp_path / "again")), _logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("storage", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int_quantized_files(storage, symmetric, tiny_llama, tmp_path) -> None:
    config = hf_quant.HfQuantConfig(bits=8, symmetric=symmetric, group_size=32, method="absmax", scale_dtype="float32")
    packed = _load(tiny_llama, quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    for name, layer in quantized_modules(packed):  # what the library stores: signed codes, a byte each
        tensor = layer.quantized()
        for suffix in ("weight_packed", "weight_shape"):
            del tensors[f"{name}.{suffix}"]
        tensors[f"{name}.weight"] = (tensor.codes().int() - 128).to(torch.int8)
        if not symmetric:
            assert tensor.zero_point is not None
            tensors[f"{name}.weight_zero_point"] = (tensor.zero_point.int() - 128).to(torch.int8)
    path = shutil.copytree(tmp_path / "packed", tmp_path / "bytes")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"]["format"] = storage
    (path / "config.json").write_text(json.dumps(settings))
    model = _load(path)
    assert len(list(quantized_modules(model))) == 14
    assert torch.equal(_logits(model), _logits(packed))
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == tensors.keys() and all(torch.equal(saved[key], tensors[key]) for key in saved)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["format"] == storage
    hf_quant.disable()
    try:
        theirs = AutoModelForCausalLM.from_pretrained(
            path, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
        torch.testing.assert_close(_logits(theirs), _logits(model), rtol=0, atol=1e-4)
    finally:
        hf_quant.enable()


# --- act-order -------------------------------------------------------------------------------------------------------


def test_reordered_layers_are_whole_layers(stored) -> None:
    model = _load(stored("gptq-act-order"), dtype=torch.float32)
    expected = _logits(model)
    assert torch.equal(_logits(copy.deepcopy(model)), expected)
    layer = model.model.layers[0].mlp.up_proj
    other = pickle.loads(pickle.dumps(layer))
    x = torch.randn(3, 64)
    assert torch.equal(other(x), layer(x))
    torch.testing.assert_close(layer(x), x @ layer.dequantize().t(), rtol=0, atol=1e-5)
    assert layer.quantized().to("cpu").order is not None
    with pytest.raises(FormatError, match="does not fit"):
        model.model.layers[0].mlp.gate_proj.assign(
            hf_quant.nn.linear.QuantLinear.from_quantized(_plain(layer)).quantized()
        )
    assert all(not report.fused for report in describe_fused(model))
    torch.testing.assert_close(_logits(model.dequantize()), expected, rtol=0, atol=1e-5)


def _plain(layer: OrderedQuantLinear) -> Any:
    tensor = layer.quantized()
    return type(tensor)(tensor.packed, tensor.scale, tensor.zero_point, tensor.scheme, tensor.shape)


def test_generate_equals_the_float_models_tokens(stored) -> None:
    path = stored("gptq-act-order")
    prompt, settings = IDS[:1, :5], {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours = _load(path, dtype=torch.float32).generate(prompt, **settings)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent / "float").generate(prompt, **settings)
    assert torch.equal(ours, theirs)


def test_lora_trains_and_merges_on_reordered_columns(stored) -> None:
    peft = pytest.importorskip("peft")
    model = _load(stored("gptq-act-order"), dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    wanted = layer.original_weight() + layer.delta(["default"])
    adapted(IDS, labels=IDS).loss.backward()
    assert float(layer.lora_A["default"].weight.grad.abs().sum()) > 0
    layer.merge()
    merged = layer.quant_layer.dequantize()
    assert float((merged - wanted).norm() / wanted.norm()) < 0.12  # the 4-bit grid
    assert layer.quant_layer.quantized().order is not None


# --- who runs it -----------------------------------------------------------------------------------------------------


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, logger="hf_quant"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == "hf_quant"]


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        ("gptq", {"bits": 3}, "bits is 3; hf-quant reads 4 and 8"),
        ("gptq", {"bits": 2}, "bits is 2; hf-quant reads 4 and 8"),
        ("gptq", {"checkpoint_format": "marlin"}, "gptq is stored as 'marlin'"),
        ("gptq", {"backend": "torch"}, "backend='torch' asks for a kernel of GPTQModel"),
        ("awq", {"version": "gemv"}, "layout is 'gemv'"),
    ],
)
def test_what_we_do_not_read_is_left_to_the_stock_quantizer(case, change, reason, warnings_of, monkeypatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(stock, "_installed", lambda package: True)
    monkeypatch.setitem(stock._replaced, case, lambda config, **kwargs: made.append(config))
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, case, stock._dispatch(case))
    AutoHfQuantizer.from_config({**CASES[case], **change}, pre_quantized=True)
    assert type(made[0]).__name__ == {"gptq": "GPTQConfig", "awq": "AwqConfig"}[case]
    (line,) = warnings_of()
    assert "left to its stock quantizer" in line and reason in line


def test_llm_int8_is_left_to_the_stock_quantizer(warnings_of) -> None:
    quantizer = AutoHfQuantizer.from_config({"quant_method": "bitsandbytes", "load_in_8bit": True}, pre_quantized=True)
    assert type(quantizer).__name__ == "Bnb8BitHfQuantizer"
    (line,) = warnings_of()
    assert "not bitsandbytes 4-bit" in line


def test_an_accelerator_is_left_to_the_stock_quantizer(warnings_of, monkeypatch) -> None:
    for device_map in ({"": "cuda:0"}, {"": 0}, {"model": "cpu", "lm_head": torch.device("cuda")}):
        assert stock._elsewhere("gptq", device_map)
        assert stock._elsewhere("compressed-tensors", device_map) is None
    for device_map in (None, "cpu", {"": "cpu"}, {"": torch.device("cpu"), "model": "disk"}):
        assert stock._elsewhere("gptq", device_map) is None
    quantizer = AutoHfQuantizer.from_config(CASES["awq"], pre_quantized=True)
    monkeypatch.setattr(stock, "_installed", lambda package: True)
    with contextlib.suppress(ImportError):  # the stock quantizer's own answer where gptqmodel is missing
        quantizer.validate_environment(device_map={"": "cuda:0"}, weights_only=True)
    assert type(quantizer).__name__ == "AwqQuantizer"
    assert "is not the CPU" in warnings_of()[0]


def _break(path: Path, key: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    tensors = load_file(path / "model.safetensors")
    changed = change(tensors.pop(key))
    if changed is not None:
        tensors[key] = changed
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("suffix", "change", "reason"),
    [
        ("g_idx", lambda t: torch.zeros_like(t), "does not put 32 columns into each of 2 groups"),
        ("g_idx", lambda t: None, "g_idx is missing"),
        ("qzeros", lambda t: t[:1].contiguous(), "qzeros is int32"),
    ],
)
def test_files_that_we_do_not_read_are_left_to_the_stock_quantizer(
    suffix, change, reason, stored, tmp_path, warnings_of
) -> None:
    if stock._installed("gptqmodel"):
        pytest.skip("gptqmodel is installed and would try to load it")
    path = shutil.copytree(stored(), tmp_path / "copy")
    _break(path, f"model.layers.1.mlp.up_proj.{suffix}", change)
    with pytest.raises(DependencyError, match="the stock quantizer of gptq needs gptqmodel"):
        AutoModelForCausalLM.from_pretrained(path)
    assert [line for line in warnings_of() if "left to its stock quantizer" in line and reason in line]


def test_scales_that_are_not_finite_are_our_error(stored, tmp_path) -> None:
    path = shutil.copytree(stored(), tmp_path / "copy")
    _break(path, "model.layers.1.mlp.up_proj.scales", lambda t: t.fill_(float("nan")))
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj\.scales holds NaN"):
        AutoModelForCausalLM.from_pretrained(path)


def test_enable_and_disable(stored) -> None:
    ours = {name: AUTO_QUANTIZER_MAPPING[name] for name in ("gptq", "awq", "compressed-tensors", "bitsandbytes_4bit")}
    hf_quant.disable()
    try:
        names = {name: AUTO_QUANTIZER_MAPPING[name].__name__ for name in ours}
        assert names["gptq"] == "GptqHfQuantizer" and names["awq"] == "AwqQuantizer"
    finally:
        hf_quant.enable()
    assert list(quantized_modules(_load(stored())))
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"].__name__ == "GPTQConfig"


_WITHOUT = """
import importlib.util, sys
found, hidden = importlib.util.find_spec, ("bitsandbytes", "compressed_tensors", "gptqmodel", "optimum")
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] in hidden else found(name, *more)
import hf_quant, torch
from transformers import AutoModelForCausalLM
from transformers.utils import is_compressed_tensors_available
assert not is_compressed_tensors_available()
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert not set(hidden) & set(sys.modules), set(hidden) & set(sys.modules)
    print(type(model.hf_quantizer).__name__, len(hf_quant.inspect_model(model)))
    model.save_pretrained(path + "-again")
hf_quant.disable()
"""


def test_loading_needs_none_of_the_stock_packages(stored, tiny_llama, tmp_path) -> None:
    paths = [shutil.copytree(stored(case), tmp_path / case) for case in ("gptq", "awq")]
    for name, settings in (("int4", {}), ("nf4", {"grid": "nf4"})):
        model = _load(tiny_llama, quantization_config=hf_quant.HfQuantConfig(method="absmax", **settings))
        model.save_pretrained(tmp_path / name)
        paths.append(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, *map(str, paths)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["StockRuntime", "14"] * 4
    again = load_file(tmp_path / "nf4-again" / "model.safetensors")
    original = load_file(tmp_path / "nf4" / "model.safetensors")
    assert again.keys() == original.keys()


def test_inspect_reads_what_others_made(stored) -> None:
    done = CliRunner().invoke(app, ["inspect", str(stored("gptq-act-order"))])
    assert done.exit_code == 0, done.output
    assert "gptq, not made by hf-quant" in done.output and "int4 sym g32" in done.output
    data = json.loads(CliRunner().invoke(app, ["inspect", str(stored("awq")), "--json"]).stdout)
    assert data["provenance"] == {"format": "awq"} and len(data["layers"]) == 14 and data["verification"] is None


def test_the_stock_loader_itself(stored, tmp_path) -> None:
    """GPTQModel in an environment of its own: ``HF_QUANT_GPTQMODEL`` is its Python (see scripts/check_stock.py)."""
    python = os.environ.get("HF_QUANT_GPTQMODEL")
    if not python:
        pytest.skip("HF_QUANT_GPTQMODEL names no Python with gptqmodel and optimum")
    child = Path(__file__).parents[2] / "scripts" / "stock_peers" / "child.py"
    for case in CASES:
        path = stored(case)
        out = tmp_path / case
        shutil.copytree(path, out)
        method = CASES[case]["quant_method"]
        backend = {"gptq": "torch", "awq": "torch_awq"}[method]
        job = {"method": method, "options": {"backend": backend}, "dtype": "float16", "source": "", "out": str(out)}
        (tmp_path / "jobs.json").write_text(json.dumps([{**job, "ids": IDS.tolist()}]))
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [python, str(child), str(tmp_path / "jobs.json")], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        error = tmp_path / f"{case}.error.txt"
        assert not error.exists(), error.read_text()
        theirs = load_file(tmp_path / f"{case}.logits.safetensors")["logits"]
        ours = _logits(_load(path))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01 * float(theirs.abs().max()), msg=case)
