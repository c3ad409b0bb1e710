"""Who runs a stock checkpoint: our runtime or the stock quantizer, with one line in the log that says why."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_files import CASES, load
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from typer.testing import CliRunner

import hf_quant
from hf_quant.cli import app
from hf_quant.errors import DependencyError, FormatError
from hf_quant.integrations import stock
from hf_quant.nn.swap import quantized_modules


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
    assert list(quantized_modules(load(stored())))
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
        model = load(tiny_llama, quantization_config=hf_quant.HfQuantConfig(method="absmax", **settings))
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
