"""hf-quant quantize with data: presets, sources, tuning, what is shown, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_quant.cli import app
from hf_quant.cli.options import build_config, calibration_flags
from hf_quant.errors import ConfigError

runner = CliRunner()
SHORT = ("--samples", "4", "--length", "24")


def run(*arguments: str | Path, code: int = 0) -> Any:
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def provenance(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text(encoding="utf-8"))["hf_quant"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("".join(f"{n} quick brown foxes jump over {n * n} lazy dogs. " for n in range(200)))
    return path


# --- options become a config ---


def config(recipe: Path | None = None, preset: str | None = None, method: str | None = None, **options: Any) -> Any:
    given = {"source": None, "samples": None, "length": None, "seed": 0, "steps": None, **options}
    return build_config(recipe, **calibration_flags(recipe, preset, method, **given))


def test_balanced_is_what_a_user_gets_who_chooses_nothing() -> None:
    found = config()
    assert (found.preset, found.method) == ("balanced", "gptq")
    assert found.calibration["source"] == "self" and found.tuning is None


def test_what_the_user_chose_is_not_overruled(tmp_path: Path) -> None:
    assert config(method="absmax").preset is None and config(method="absmax").calibration is None
    assert config(preset="fast").calibration is None
    assert config(preset="best").tuning["steps"] > 0
    recipe = tmp_path / "r.yaml"
    recipe.write_text("bits: 8\n", encoding="utf-8")
    assert config(recipe).method == "search"
    assert config(recipe, preset="balanced").method == "gptq"


def test_the_options_reach_their_sections() -> None:
    found = config(source="docs", samples=7, length=33, seed=5, steps=9)
    assert found.calibration == {"source": "docs", "samples": 7, "length": 33, "seed": 5, "fold": True}
    assert found.tuning["steps"] == 9
    assert config(preset="best", steps=0).tuning in (None, {**config(preset="best").tuning, "steps": 0})
    assert config(preset="fast", seed=5).calibration is None  # a seed is no wish for calibration


@pytest.mark.parametrize("options", [{"source": "docs"}, {"samples": 8}, {"length": 64}, {"steps": 5}])
def test_data_for_a_method_that_uses_none_is_refused(options: dict[str, Any]) -> None:
    for choice in ({"preset": "fast"}, {"method": "absmax"}):
        with pytest.raises(ConfigError, match="Fix: "):
            config(**choice, **options)


# --- the command ---


def test_a_calibrated_run_on_a_file(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = run("quantize", tiny_llama, "-o", out, "--calibration", text_file, *SHORT, "--tuning-steps", "2", "-v")
    record = provenance(out)
    assert (record["recipe"]["preset"], record["method"]) == ("balanced", "gptq")
    assert record["data"]["source"] == "file:fox.txt"
    assert (record["data"]["samples"], record["data"]["tokens"]) == (4, 96)
    assert record["data"]["sha256"][:12] in shown.stderr
    lines = [line for line in shown.stderr.splitlines() if "/14  model.layers." in line]
    assert len(lines) == 14 and all("error" in line and "s left" in line for line in lines)
    assert "tune 2/2: loss" in shown.stderr
    assert str(out) in shown.stdout and "balanced" in shown.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    inspected = run("inspect", out).stdout
    assert "gptq" in inspected


def test_samples_of_the_model_itself_by_default(tiny_llama: Path, tmp_path: Path) -> None:
    run("quantize", tiny_llama, "-o", tmp_path / "one", *SHORT)
    run("quantize", tiny_llama, "-o", tmp_path / "two", *SHORT)
    assert provenance(tmp_path / "one")["data"]["source"] == "self"
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    run("quantize", tiny_llama, "-o", tmp_path / "other", *SHORT, "--seed", "1")
    first, second = (provenance(tmp_path / name)["data"] for name in ("one", "other"))
    assert first["sha256"] != second["sha256"] and second["seed"] == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--preset", "perfect"), "preset"),
        (("--samples", "1"), "samples"),
        (("--length", "2"), "length"),
        (("--calibration", ""), "source"),
        (("--calibration", "missing.txt"), "missing.txt"),
        (("--calibration", "images:nowhere"), "text"),
        (("--preset", "fast", "--calibration", "docs"), "calibration"),
        (("--preset", "fast", "--tuning-steps", "4"), "tuning"),
        (("--method", "absmax", "--samples", "8"), "calibration"),
        (("--seed", "-1", *SHORT), "seed"),
    ],
)
def test_wrong_choices_are_named(tiny_llama: Path, tmp_path: Path, flags: tuple[str, ...], words: str) -> None:
    result = run("quantize", tiny_llama, "-o", tmp_path / "out", *flags, code=2)
    lines = result.stderr.strip().splitlines()
    (problem,) = [line for line in lines if line.startswith("error: ")]
    assert lines[-1].startswith("fix:   ") and "Traceback" not in result.stderr and result.stdout == ""
    assert words in problem + lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_negative_number_of_steps_is_refused_by_the_parser(tiny_llama: Path, tmp_path: Path) -> None:
    assert "--tuning-steps" in run("quantize", tiny_llama, "-o", tmp_path / "o", "--tuning-steps", "-1", code=2).stderr


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(
    tiny_checkpoint, text_file: Path, tmp_path: Path
) -> None:
    model = tiny_checkpoint("llama", num_hidden_layers=12)
    command = ["quantize", model, "-o", tmp_path / "out", "--calibration", text_file, *SHORT, "-v"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_quant.cli", *map(str, command)], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stderr is not None
    shown = b""
    for line in process.stderr:
        shown += line
        if b" 15/84 " in line:
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, (shown + rest).decode()
    assert b"Traceback" not in shown + rest
    assert [path.name for path in tmp_path.iterdir()] == [".out.journal"]
    again = run(*command)
    resumed = [line for line in again.stderr.splitlines() if "from the journal" in line]
    assert 14 <= len(resumed) < 84
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
