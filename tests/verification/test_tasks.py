"""Recorded tasks are run again, and a score, a flip or an item that differs is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.card import write_card
from hf_quant.checkpoint import RESULTS_FILE, record_evidence
from hf_quant.evaluation import EvaluationResult, evaluate_directory
from hf_quant.evaluation.task_results import TaskRun
from hf_quant.evaluation.tasks import add_tasks
from hf_quant.verification.tasks import compare_runs

pytest.importorskip("lm_eval")
NAME = "hfq-cloze-prose"


@pytest.fixture(scope="module")
def measured(float_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with little but a task in its results; read only."""
    directory = tmp_path_factory.mktemp("tasks") / "tiny"
    hf_quant.quantize(str(float_model), HfQuantConfig(bits=4, group_size=32), directory)
    little: dict[str, Any] = {"windows": 2, "length": 16, "progress": False}
    little |= dict.fromkeys(("speed", "depth", "noise_floor", "int8_activations"), False)
    evaluate_directory(directory, str(float_model), texts=(str(text),), **little)
    add_tasks(directory, str(float_model), [NAME], limit=6, progress=False)
    write_card(directory)
    return directory


def _run(measured: Path) -> TaskRun:
    return EvaluationResult.read(measured / RESULTS_FILE).tasks[0]


def _forged(run: TaskRun, change: Callable[[dict[str, Any]], None]) -> TaskRun:
    plain = run.model_dump()
    change(plain["tasks"][0])
    return TaskRun.model_validate(plain)


def test_tasks_are_run_again_on_demand(measured: Path, float_model: Path, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"metrics": True, "reference": float_model, "texts": [str(text)], "progress": False}
    report = hf_quant.verify(measured, tasks=True, **options)
    assert report.ok, report.problems
    assert not any("not run again" in finding.problem for finding in report.notes)

    lying = Path(shutil.copytree(measured, tmp_path / "lying"))
    plain = json.loads((lying / RESULTS_FILE).read_text())
    metric = plain["tasks"][0]["tasks"][0]["metrics"][0]
    metric["quantized_value"] = 1.0 if metric["quantized_value"] < 0.5 else 0.0
    (lying / RESULTS_FILE).write_text(json.dumps(plain))
    record_evidence(lying, [RESULTS_FILE])
    write_card(lying)
    assert any("--tasks" in finding.problem for finding in hf_quant.verify(lying, **options).notes)
    (found,) = hf_quant.verify(lying, tasks=True, **options).problems
    assert found.subject == f"task {NAME} {metric['metric']} quantized_value"


def test_what_differs_is_named(measured: Path) -> None:
    run = _run(measured)
    assert compare_runs(run.tasks, run) == (2 * len(run.tasks[0].metrics), [])
    other = _forged(run, lambda task: task.update(items_sha256="0" * 64))
    (found,) = compare_runs(other.tasks, run)[1]
    assert "asks other items" in found.problem

    flipped = _forged(run, lambda task: task["metrics"][0]["paired"].update(right_to_wrong=5))
    (found,) = compare_runs(flipped.tasks, run)[1]
    assert found.subject.endswith("flips")
    near = run.tasks[0].metrics[0].quantized_value + 2 / run.tasks[0].items
    turned = _forged(run, lambda task: task["metrics"][0].update(quantized_value=near))
    assert compare_runs(turned.tasks, run)[1] == [], "two close answers may turn over"
    gone = _forged(run, lambda task: task["metrics"][0].update(metric="f1"))
    assert "not measured here" in compare_runs(gone.tasks, run)[1][0].problem
