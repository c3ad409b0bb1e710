"""``hf-quant evaluate --tasks``: names before work, tasks added to results that are there, a card with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_quant.cli.app import app
from hf_quant.cli.task_options import split_specs
from hf_quant.evaluation import EvaluationResult

pytest.importorskip("lm_eval", reason='lm-eval is not installed (pip install "hf-quant[tasks]")')


def run(*arguments: str | Path, code: int = 0) -> Any:
    found = CliRunner().invoke(app, [str(part) for part in arguments])
    assert found.exit_code == code, found.output
    return found


def test_names_are_separated_by_commas_but_paths_keep_theirs(tmp_path: Path) -> None:
    odd = tmp_path / "a,b.yaml"
    odd.write_text("task: odd\n")
    assert split_specs(["arc_easy,builtin", str(odd)]) == ["arc_easy", "builtin", str(odd)]


def test_tasks_join_the_results_and_the_card(tmp_path: Path, tiny_checkpoint: Any) -> None:
    reference, out = tiny_checkpoint("llama", max_position_embeddings=2048), tmp_path / "out"
    run("quantize", reference, "-o", out, "--preset", "fast")
    wrong = run("evaluate", out, "-r", reference, "--tasks", "hfq-cloce", code=2)
    assert "close to it are hfq-cloze" in wrong.output and not (out / "evaluation.json").exists()
    alone = run("evaluate", out, "-r", reference, "--only-tasks", code=2)
    assert "--only-tasks without tasks" in alone.output
    run("evaluate", out, "-r", reference, "--windows", 2, "--length", 32, "--no-speed", "--no-noise-floor")
    before = EvaluationResult.read(out / "evaluation.json")
    found = run("evaluate", out, "-r", reference, "--tasks", "hfq-continuation", "--limit", 6, "--only-tasks", "--json")
    results = EvaluationResult.read(out / "evaluation.json")
    assert json.loads(found.stdout) == json.loads(results.model_dump_json()) and results.texts == before.texts
    (tasks,) = results.tasks
    assert [task.items for task in tasks.tasks] == [6, 6]
    assert tasks.command is not None and "--only-tasks" in tasks.command and str(tmp_path) not in tasks.command
    run("card", out)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "## Tasks" in card and "hfq-continuation-prose" in card.partition("\n## ")[0]  # and in the model index
    assert (out / "plots" / "tasks.png").is_file() and "](plots/tasks.png)" in card
