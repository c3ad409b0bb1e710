"""Checkpoints of ours in stock transformers, in a process that never imports hf_quant: same weights, same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_quant
from hf_quant.config import HfQuantConfig
from hf_quant.formats import FORMATS
from hf_quant.plan import make_plan

CHILD = Path(__file__).with_name("stock_load_child.py")
IDS = torch.arange(3, 27).view(2, 12)
MIXED = {"overrides": {"re:.*(mlp|fc).*": {"bits": 8, "group_size": -1}, "re:.*layers.0.*q_proj": "float"}}
LINEAR_ARCHITECTURES = ("llama", "qwen3", "gemma3_text", "mistral", "opt", "phi")


@dataclass(frozen=True)
class Case:
    """One checkpoint, and how stock transformers is asked to load it."""

    name: str
    architecture: str
    recipe: dict[str, Any] = field(hash=False)
    dequantize: bool = False
    dtype: str = "float32"
    scales: str = "float32"
    fails: str = ""  # what its error says; "garbage" when it loads and computes nonsense


def _int(bits: int, symmetric: bool, group: int, **more: Any) -> dict[str, Any]:
    return {"grid": "int", "bits": bits, "symmetric": symmetric, "group_size": group, **more}


def _table(grid: str, nested: bool, group: int, **more: Any) -> dict[str, Any]:
    return {"grid": grid, "double_quant": nested, "group_size": group, **more}


def _cases() -> list[Case]:
    cases = []
    for bits in (4, 8):
        for group in (32, 64, -1):
            cases.append(Case(f"int{bits}-sym-{group}", "llama", _int(bits, True, group)))
            cases.append(Case(f"int{bits}-asym-{group}-dequantize", "llama", _int(bits, False, group), dequantize=True))
        cases.append(Case(f"int{bits}-sym-dequantize", "llama", _int(bits, True, 32), dequantize=True))
        cases.append(Case(f"int{bits}-asym", "llama", _int(bits, False, 32), fails="mismatched"))
    for architecture in LINEAR_ARCHITECTURES:
        cases.append(Case(f"{architecture}-int4", architecture, _int(4, True, 32)))
        cases.append(Case(f"{architecture}-int8-asym", architecture, _int(8, False, -1), dequantize=True))
        cases.append(Case(f"{architecture}-mixed", architecture, _int(4, True, 32, **MIXED)))
    bits = {"overrides": {"re:.*mlp.*": {"bits": 8}}}
    groups = {"overrides": {"re:.*mlp.*": {"group_size": 64}}}
    one_asymmetric = {"overrides": {"re:.*mlp.*": {"symmetric": False}}}
    cases += [
        Case("bits", "llama", _int(4, True, 32, **bits)),
        Case("bits-dequantize", "llama", _int(4, True, 32, **bits), dequantize=True, fails="garbage"),
        Case("groups", "llama", _int(4, True, 32, **groups)),
        Case("groups-dequantize", "llama", _int(4, True, 32, **groups), dequantize=True, fails="conversion"),
        Case("one-asym", "llama", _int(4, True, 32, **one_asymmetric), fails="mismatched"),
        Case("one-asym-dequantize", "llama", _int(4, True, 32, **one_asymmetric), dequantize=True, fails="conversion"),
    ]
    table, other = {"overrides": {"embed_tokens": {}}}, {"overrides": {"embed_tokens": {"bits": 8}}}
    for architecture in ("llama", "qwen3", "gemma3_text"):  # the last is tied, and multiplies what it looks up
        recipe = _int(4, True, 32, **table)
        cases.append(Case(f"{architecture}-table", architecture, recipe, fails="no attribute"))
        cases.append(Case(f"{architecture}-table-dequantize", architecture, recipe, dequantize=True))
    cases += [
        Case("table-asym-dequantize", "llama", _int(8, False, 64, **table), dequantize=True),
        Case("other-table", "llama", _int(4, True, 32, **other), fails="no attribute"),
        Case("other-table-dequantize", "llama", _int(4, True, 32, **other), dequantize=True, fails="garbage"),
    ]
    for dtype in ("bfloat16", "float16"):
        half = {"dtype": dtype, "scales": dtype}
        cases.append(Case(f"{dtype}-int4", "llama", _int(4, True, 32), **half))
        cases.append(Case(f"{dtype}-int4-asym", "llama", _int(4, False, 32), dequantize=True, **half))
        cases.append(Case(f"{dtype}-nf4", "llama", _table("nf4", True, 64), dtype=dtype))
    cases.append(Case("float32-model-bfloat16-scales", "llama", _int(4, True, 32), scales="bfloat16"))
    for grid in ("nf4", "fp4"):
        for nested in (False, True):
            for group in (32, 64):
                cases.append(
                    Case(f"{grid}-{'nested' if nested else 'plain'}-{group}", "llama", _table(grid, nested, group))
                )
    blocks = {
        "overrides": {"re:.*(mlp|fc).*": {"group_size": 32}, "re:.*(0|1).*": {"grid": "fp4", "double_quant": False}}
    }
    for architecture in (*LINEAR_ARCHITECTURES, "gpt2"):
        cases.append(Case(f"{architecture}-nf4", architecture, _table("nf4", True, 64)))
        cases.append(Case(f"{architecture}-nf4-mixed", architecture, _table("nf4", True, 64, **blocks)))
    return cases


CASES = _cases()


def _write(
    path: Path, case: Case, model: Any, absmax_tensor: Callable[..., Any]
) -> tuple[torch.Tensor, list[str], str]:
    """Write the checkpoint; the logits that it must give, its quantized modules, and the card's sentence."""
    dtype, scales = getattr(torch, case.dtype), getattr(torch, case.scales)
    model = model.to(dtype)
    plan = make_plan(model, HfQuantConfig(method="absmax", **case.recipe))
    encoder = FORMATS[plan.format]
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    state = {key: value.clone() for key, value in model.state_dict().items() if key not in tied}
    for layer in plan.quantized:
        weight = model.get_submodule(layer.name).weight
        transposed = layer.kind == "Conv1D"
        tensor = absmax_tensor(weight.t() if transposed else weight, layer.scheme, scales)
        del state[f"{layer.name}.weight"]
        state.update({f"{layer.name}.{key}": value for key, value in encoder.encode(tensor, dtype=dtype).items()})
        exact = tensor.dequantize(dtype)
        weight.data = (exact.t() if transposed else exact).contiguous()
    path.mkdir()
    save_file({key: value.contiguous() for key, value in state.items()}, path / "model.safetensors", {"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=False))
    config |= {"architectures": [type(model).__name__], "dtype": case.dtype}
    config["quantization_config"] = encoder.quantization_config(plan, dtype=dtype)
    (path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        logits = model(IDS).logits.float()
    return logits, sorted(layer.name for layer in plan.quantized), encoder.stock_loading(plan)


@dataclass
class Outcome:
    """What the child reported about one case, beside what was expected of it."""

    expected: torch.Tensor
    quantized: list[str]
    sentence: str
    report: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def _load_with_stock(jobs: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What the child says of every job; the logits lie in ``folder``."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run([sys.executable, str(CHILD), str(folder)], cwd=folder, env=environment, check=True, timeout=600)
    reports: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return reports


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, tiny_model, absmax_tensor) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("stock")
    written, jobs = {}, []
    for case in CASES:
        path = folder / case.name
        written[case.name] = _write(path, case, tiny_model(case.architecture), absmax_tensor)
        kind = json.loads((path / "config.json").read_text())["quantization_config"]["quant_method"]
        jobs.append({"name": case.name, "path": str(path), "dequantize": case.dequantize, "kind": kind})
    reports = _load_with_stock(jobs, folder)
    outcomes: dict[str, Any] = {"foreign": reports["foreign"], "bfloat16 only": reports["bfloat16 only"]}
    for case in CASES:
        file = folder / f"{case.name}.safetensors"
        tensors = load_file(file) if file.exists() else {}
        outcomes[case.name] = Outcome(*written[case.name], reports[case.name], tensors)
    return outcomes


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_child_never_imported_us(outcomes) -> None:
    assert outcomes["foreign"] == []


@pytest.mark.parametrize("case", [case for case in CASES if not case.fails], ids=lambda case: case.name)
def test_stock_logits_equal_ours(case, outcomes) -> None:
    outcome = outcomes[case.name]
    assert "error" not in outcome.report, outcome.report
    assert outcome.report["keys"] == {}, "missing, unexpected or mismatched keys"
    assert outcome.report["packed"] == ([] if case.dequantize else outcome.quantized)
    assert outcome.report["dtype"] == f"torch.{case.dtype}"
    exact = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}[case.dtype]
    table = "dequantized" in outcome.tensors
    if table:
        assert _relative(outcome.tensors["dequantized"], outcome.expected) <= exact
    # its run time on x86 with AVX512-BF16 rounds activations and absmax to bfloat16
    coarse = 5e-2 if table and outcomes["bfloat16 only"] else exact
    assert _relative(outcome.tensors["logits"], outcome.expected) <= coarse


@pytest.mark.parametrize("case", [case for case in CASES if case.fails], ids=lambda case: case.name)
def test_stock_cannot_load_what_the_card_says_it_cannot(case, outcomes) -> None:
    outcome = outcomes[case.name]
    if case.fails == "garbage":
        assert not _relative(outcome.tensors["logits"], outcome.expected) <= 1e-2
    else:
        assert case.fails in outcome.report["error"]


def test_the_card_sentence_agrees_with_what_loads(outcomes) -> None:
    """For each checkpoint, the way that the sentence names is one that worked."""
    worked = {
        (outcome.sentence, case.dequantize) for case in CASES if not case.fails for outcome in [outcomes[case.name]]
    }
    failed = {(outcome.sentence, case.dequantize) for case in CASES if case.fails for outcome in [outcomes[case.name]]}
    for sentence, dequantize in worked | failed:
        needs = "from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True))" in sentence
        cannot = "cannot load" in sentence or (dequantize and "do not pass" in sentence)
        assert ((sentence, dequantize) in failed) == (cannot or (needs and not dequantize)), (sentence, dequantize)
    assert not worked & failed


def test_float_experts_beside_packed_layers(tmp_path, tiny_model) -> None:
    """Stock transformers takes experts that it merges for packed ones; those of other files it loads, as we say."""
    jobs, expected = [], {}
    for kind in ("mixtral", "qwen3_moe", "gpt_oss"):
        directory, config = tmp_path / kind, HfQuantConfig(method="absmax", skip=["re:.*experts.*"])
        model = hf_quant.quantize(tiny_model(kind), config, directory)
        with torch.no_grad():
            expected[kind] = model(IDS).logits
        again = hf_quant.load(directory, kernel="reference")
        with torch.no_grad():
            assert _relative(again(IDS).logits, expected[kind]) <= 1e-5
        jobs.append({"name": f"{kind}-logits", "path": str(directory), "dequantize": False, "kind": "int"})
    reports = _load_with_stock(jobs, tmp_path)
    for kind, logits in expected.items():
        report = reports[f"{kind}-logits"]
        said = json.loads((tmp_path / kind / "config.json").read_text())["hf_quant"]["stock_loading"]
        assert ("in float beside packed layers" in said) == (kind != "gpt_oss")
        if "cannot load" in said:
            assert "conversion" in report["error"]
            continue
        assert report.get("keys") == {}, report
        assert len(report["packed"]) == 8 and all("self_attn" in name for name in report["packed"])
        found = load_file(tmp_path / f"{kind}-logits.safetensors")["logits"]
        assert _relative(found, logits) <= 1e-5
