"""The card's tasks: every figure of the section is a recorded one, the plot shows the same, the model index too."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from hf_quant.card_metadata import eval_results
from hf_quant.card_tasks import section
from hf_quant.evaluation.results import Environment, EvaluationResult, Protocol, SizeResult
from hf_quant.evaluation.task_results import GroupResult, MetricResult, Paired, TaskResult, TaskRun
from hf_quant.evaluation.task_table import task_rows, verdict
from hf_quant.plots import draw
from hf_quant.plots_tasks import draw_tasks


def metric(name: str = "acc", **changes: Any) -> MetricResult:
    known: dict[str, Any] = {
        "metric": name,
        "filter": "none",
        "higher_is_better": True,
        "float_value": 0.625,
        "float_stderr": 0.049,
        "quantized_value": 0.5875,
        "quantized_stderr": 0.051,
        "recovery_percent": 94.0,
        "recovery_stderr": 2.4,
        "paired": Paired(
            items=400, difference=-0.0375, stderr=0.015, right_to_wrong=27, wrong_to_right=12, p_value=0.0237
        ),
    }
    return MetricResult(**{**known, **changes})


def task(name: str = "arc_easy", metrics: tuple[MetricResult, ...] = (metric(),), **changes: Any) -> TaskResult:
    known: dict[str, Any] = {
        "name": name,
        "source": "lm-eval",
        "dataset": "allenai/ai2_arc",
        "dataset_config": "ARC-Easy",
        "split": "test",
        "version": "1.0",
        "config_sha256": "c" * 64,
        "items_sha256": "ab" * 32,
        "runs_code": False,
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "items": 400,
        "items_available": 2376,
        "metrics": metrics,
    }
    return TaskResult(**{**known, **changes})


def task_run(*tasks: TaskResult, **changes: Any) -> TaskRun:
    known: dict[str, Any] = {
        "created": "2026-11-24T01:02:03+00:00",
        "versions": {"lm-eval": "0.4.13"},
        "dtype": "float32",
        "device": "cpu",
        "kernels": {"native": 210},
        "num_fewshot": None,
        "limit": 400,
        "batch_size": 8,
        "chat_template": False,
        "seed": 0,
        "tasks": tasks,
        "command": "hf-quant evaluate out --tasks arc_easy",
    }
    return TaskRun(**{**known, **changes})


def results(*runs: TaskRun) -> EvaluationResult:
    return EvaluationResult(
        created="2026-11-24T00:00:00+00:00",
        candidate="out",
        candidate_digest=None,
        reference="base",
        reference_revision=None,
        reference_dtype="float32",
        protocol=Protocol(windows=2, length=8, dtype="float32", device="cpu", seed=0, bootstrap_samples=10),
        texts=(),
        size=SizeResult(
            float_disk_bytes=2,
            quantized_disk_bytes=1,
            float_memory_bytes=2,
            quantized_memory_bytes=1,
            bits_per_weight=4.5,
        ),
        speed=(),
        environment=Environment(machine="m", cpu="c", cores=1, accelerator=None, python="3.11", versions={}),
        command=None,
        tasks=runs,
    )


PERPLEXITY = metric(
    "perplexity",
    higher_is_better=False,
    float_value=12.3456,
    quantized_value=13.1,
    float_stderr=0.4,
    quantized_stderr=0.5,
    recovery_percent=94.24,
    recovery_stderr=None,
    paired=None,
)


def test_every_figure_is_shown():
    text = section(
        [task_run(task(), task("lambada", (PERPLEXITY,), dataset=None))], ("plots/tasks.png", "kept [100 %]")
    )
    assert text.startswith("## Tasks\n") and text.endswith("\n\n")
    assert (
        "| `arc_easy` | `acc` | 400 | 62.5 ± 4.9 % | 58.8 ± 5.1 % | 94.0 ± 2.4 % | -3.8 ± 1.5 | 27 / 12 | 0.024 |"
        in text
    )
    assert "| `lambada` | `perplexity` | 400 | 12.346 ± 0.400 | 13.100 ± 0.500 | 94.2 % | – | – | – |" in text
    assert "the first 400 items of each task" in text and "native (210)" in text and "abababababababab" in text
    assert "`allenai/ai2_arc / ARC-Easy / test`" in text and "hf-quant evaluate out --tasks arc_easy" in text
    assert r"![kept \[100 %\]](plots/tasks.png)" in text
    assert "Of 1 exact tests 1 has p < 0.05; between two equal models at most 0.05 would on average." in text
    assert section([]) == ""


def test_groups_stand_for_their_tasks_and_odd_names_stay_in_their_cells():
    group = GroupResult(name="mm|lu", tasks=("a", "b"), metrics=(metric(),))
    run = task_run(task("a"), task("b"), task("c`|", runs_code=True, source="own.yaml", num_fewshot=5), groups=(group,))
    assert [(row.task, row.items, row.metric) for row in task_rows([run])] == [
        ("mm|lu", 800, "acc"),
        ("c`|", 400, "acc, 5-shot"),
    ]
    text = section([run])
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace(r"\|", "").count("|") for line in table} == {10}
    assert "from `own.yaml`, version 1.0, runs Python code of its own" in text


def test_verdict_counts_what_chance_would():
    sure = metric(paired=Paired(items=9, difference=0, stderr=0, right_to_wrong=1, wrong_to_right=1, p_value=1.0))
    rows = task_rows([task_run(task(metrics=(metric(), sure, sure, sure)), task("x", (PERPLEXITY,)))])
    assert verdict(rows).startswith("Of 4 exact tests 1 has p < 0.05; between two equal models at most 0.2")
    assert verdict(task_rows([task_run(task("x", (PERPLEXITY,)))])) == ""


def test_the_plot_is_reproducible_and_skips_what_has_no_recovery():
    rows = task_rows([task_run(task(), task("lambada", (PERPLEXITY,)), task("zero", (metric(recovery_percent=None),)))])
    first, second = draw_tasks(rows), draw_tasks(rows)
    assert (
        first is not None
        and second is not None
        and first.files == second.files
        and set(first.files) == {".png", ".svg"}
    )
    assert first.caption == "Share of the float model's score that is kept: 94.0 to 94.2 %"
    assert draw_tasks(task_rows([task_run(task("zero", (metric(recovery_percent=None),)))])) is None
    many = draw_tasks(task_rows([task_run(*(task(f"t{i}") for i in range(50)))]))
    assert many is not None and many.caption.endswith("; 10 more are in the table")
    from matplotlib.image import imread

    assert np.ptp(imread(io.BytesIO(first.files[".png"]))[..., :3]) > 0.5  # something is drawn on the page
    assert [plot.name for plot in draw(results(task_run(task())), [])] == ["tasks"]
    assert draw(results(), []) == []


def test_the_model_index_tells_tasks_of_one_dataset_apart():
    run = task_run(
        task(),
        task("arc_challenge", dataset_config="ARC-Challenge"),
        task("arc_easy_again"),
        task("hfq-cloze-docs", dataset=None, dataset_config=None),
        task("local", dataset="json", dataset_config=None),
    )
    found = eval_results(results(run), "text-generation")
    assert len({entry.unique_identifier for entry in found}) == 5
    kinds = {entry.dataset_name: entry.dataset_type for entry in found}
    assert kinds == {
        "arc_easy": "allenai/ai2_arc",
        "arc_challenge": "allenai/ai2_arc",
        "arc_easy_again": "arc_easy_again",
        "hfq-cloze-docs": "hfq-cloze-docs",
        "local": "local",
    }
    assert found[0].metric_value == 0.5875 and found[0].metric_args == {"float_value": 0.625, "stderr": 0.051}


def test_no_figure_that_is_no_number():
    with pytest.raises(ValidationError):
        metric(float_value=float("nan"))
