"""Budgets end to end: the allocation keeps its limit, is measured where it must be, and stock transformers loads it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.budgeting import quantize_to_budget
from hf_quant.calibration import from_batches
from hf_quant.cli import app
from hf_quant.errors import BudgetError, OutputExistsError, SensitivityError
from hf_quant.integrations.calibrated import Session
from hf_quant.quantize.allocate import Budget
from hf_quant.quantize.gains import calibrated_gains, with_gains
from hf_quant.quantize.menu import make_menu
from hf_quant.quantize.sensitivity_record import LayerSensitivity, Sensitivity

runner = CliRunner()


def data(samples: int = 16, length: int = 24, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 380, (samples, length), generator=generator)
    return from_batches([{"input_ids": part} for part in ids.split(4)])


def budget(**limit: Any) -> Budget:
    found = Budget.parse(**limit)
    assert found is not None
    return found


def labels(out: Path) -> dict[str, str]:
    rows = json.loads((out / "hf_quant.json").read_text(encoding="utf-8"))["plan"]
    return {row["name"]: row["label"] for row in rows if row["label"]}


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_average_bits_are_kept_and_the_file_loads_everywhere(tiny_llama: Path, tmp_path: Path, preset: str) -> None:
    out = tmp_path / "out"
    config = HfQuantConfig(preset=preset, kernel="reference")
    run = quantize_to_budget(tiny_llama, config, budget(target_bits=6), out, session=Session(data=data()))
    chosen = run.fitted.allocation
    assert 4.5 < chosen.bits_per_weight <= 6 and run.fitted.measured is None
    stored = labels(out)
    assert len({label.split()[0] for label in stored.values()}) == 2  # int4 and int8 side by side
    for block in range(2):
        prefix = f"model.layers.{block}"
        assert len({stored.get(f"{prefix}.self_attn.{leaf}_proj") for leaf in "qkv"}) == 1
        assert stored.get(f"{prefix}.mlp.gate_proj") == stored.get(f"{prefix}.mlp.up_proj")
    record = json.loads((out / "config.json").read_text(encoding="utf-8"))["hf_quant"]
    assert record["budget"]["kind"] == "target_bits" and record["budget"]["limit"] == 6
    assert record["method"] == config.method and (record["data"] is None) == (preset == "fast")
    assert (out / "plots" / "budget.png").stat().st_size > 1000
    ours = hf_quant.load(out, dtype=torch.float32, kernel="reference")
    ids = data(1).batches[0]["input_ids"]
    with torch.no_grad():
        expected = ours(ids).logits
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        "m = A.from_pretrained(sys.argv[1], dtype=torch.float32); assert 'hf_quant' not in sys.modules\n"
        "torch.save(m(torch.load(sys.argv[2])).logits, sys.argv[3])"
    )
    torch.save(ids, tmp_path / "ids.pt")
    command = [sys.executable, "-c", script, str(out), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=2e-3, atol=2e-3)


def test_a_loss_is_measured_and_kept_and_the_winning_try_is_not_repeated(tiny_llama: Path, tmp_path: Path) -> None:
    attempts: list[Any] = []
    layers: list[Any] = []
    config = HfQuantConfig(preset="balanced", kernel="reference")
    session = Session(data=data(), on_layer=layers.append)
    # loosest and tightest of what is possible, then something between them
    loose = quantize_to_budget(
        tiny_llama, config, budget(target_bits=4.3), tmp_path / "a", session=Session(data=data())
    )
    limit = loose.fitted.allocation.predicted_kl / 2
    run = quantize_to_budget(
        tiny_llama, config, budget(max_kl=limit), tmp_path / "b", session=session, on_attempt=attempts.append
    )
    assert run.fitted.measured is not None and run.fitted.measured.kl <= limit
    assert 1 <= len(attempts) <= 4 and any(attempt.fits for attempt in attempts)
    assert not layers  # the tries are silent, and the final run takes the journal of the try that was kept
    record = json.loads((tmp_path / "b" / "config.json").read_text(encoding="utf-8"))["hf_quant"]["budget"]
    assert record["held_out_kl"] == run.fitted.measured.kl and record["held_out_loss_increase"] is not None
    index = run.fitted.best_attempt
    assert index is not None and attempts[index].allocation.choices == run.fitted.allocation.choices


def test_sensitivities_are_kept_reused_and_refused_for_something_else(
    tiny_llama: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "sensitivities.json"
    config = HfQuantConfig(preset="fast", kernel="reference")
    passes: list[tuple[int, int]] = []

    def quantize(model: Path, out: str, samples: Any) -> Any:
        return quantize_to_budget(
            model,
            config,
            budget(target_bits=5),
            tmp_path / out,
            sensitivities=file,
            session=Session(data=samples),
            on_sensitivity=lambda done, total: passes.append((done, total)),
        )

    first = quantize(tiny_llama, "a", data())
    seen = len(passes)
    assert seen and file.is_file()
    second = quantize(tiny_llama, "b", data())
    assert len(passes) == seen and second.fitted.allocation.choices == first.fitted.allocation.choices
    with pytest.raises(SensitivityError, match="another calibration data"):
        quantize(tiny_llama, "c", data(seed=4))
    with pytest.raises(SensitivityError, match="another model"):
        quantize(tiny_checkpoint("llama", seed=5), "d", data())
    assert not (tmp_path / "c").exists() and not (tmp_path / "d").exists()


def test_what_is_impossible_says_what_is_possible(tiny_llama: Path, tmp_path: Path) -> None:
    config = HfQuantConfig(preset="fast", kernel="reference")
    with pytest.raises(BudgetError, match=r"3\.5"):
        quantize_to_budget(tiny_llama, config, budget(target_bits=3.5), tmp_path / "a", session=Session(data=data()))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    with pytest.raises(OutputExistsError):
        quantize_to_budget(tiny_llama, config, budget(target_bits=5), tmp_path / "there", session=Session(data=data()))
    with pytest.raises(BudgetError, match="not a directory"):
        quantize_to_budget("org/model", config, budget(target_bits=5), tmp_path / "b")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_the_command_line_takes_budgets(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} quick brown foxes jump over {n * n} lazy dogs. " for n in range(200)))
    out = tmp_path / "out"
    base = ["quantize", str(tiny_llama), "-o", str(out), "--preset", "fast"]
    result = runner.invoke(app, [*base, "--max-size", "260KB"])
    assert result.exit_code == 0, result.output
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) <= 260_000
    assert "max_size=260KB" in result.output and "bits per weight" in result.output
    for wrong, words in (
        (["--max-size", "260KB", "--target-bits", "5"], "give one budget"),
        (["--max-size", "large"], "max_size='large'"),
        (["--sensitivities", "s.json"], "without a budget"),
    ):
        result = runner.invoke(app, [*base, "--overwrite", *wrong])
        assert result.exit_code == 2 and words in result.output, result.output


def test_gains_are_what_guided_rounding_saves(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    menu = make_menu(model, HfQuantConfig(preset="balanced"))
    gains = calibrated_gains(model, data().batches, menu)
    assert set(gains) == {layer.name for layer in menu.layers}
    assert all(0 < gain < 1 for gain in gains.values())
    costs = {layer.name: LayerSensitivity(layer.shape, 8, {"int4 sym g32": 2.0}) for layer in menu.layers}
    scaled = with_gains(Sensitivity("m", "d", {}, costs), gains)
    for name, gain in gains.items():
        assert scaled.cost(name, "int4 sym g32") == 2.0 * gain
