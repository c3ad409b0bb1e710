"""The recorded tasks, run again on both models, and their scores compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_quant.evaluation.results import EvaluationResult
from hf_quant.evaluation.task_loading import BUILT_IN_SOURCE, HARNESS, load_tasks
from hf_quant.evaluation.task_results import MetricResult, TaskResult, TaskRun
from hf_quant.evaluation.tasks import evaluate_tasks
from hf_quant.verification.findings import Finding, note

# Where two answers are nearly as likely, the order of floating-point sums decides: so many items may turn over.
ITEMS = 2
_FIX = "run `hf-quant evaluate --tasks` and `hf-quant card` again, or ask its maker how it was measured."


def check_tasks(
    directory: Path,
    recorded: EvaluationResult,
    reference: str,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> tuple[int, list[Finding]]:
    """(scores compared, findings) of the recorded tasks that can be had by name: built-in ones, and lm-eval's.

    Raises:
        DependencyError: lm-eval is not installed.
        EvaluationError: a task's data cannot be had.
    """
    count, findings = 0, []
    for run in recorded.tasks:
        named = [task for task in run.tasks if task.source in (BUILT_IN_SOURCE, HARNESS)]
        for task in run.tasks:
            if task not in named:
                problem = f"is of {task.source}, which is not here: it is not measured again."
                findings.append(note("metrics", f"task {task.name}", problem))
        if not named:
            continue
        again = evaluate_tasks(
            directory,
            reference,
            load_tasks([task.name for task in named]),
            num_fewshot=run.num_fewshot,
            limit=run.limit,
            batch_size=run.batch_size,
            chat_template=run.chat_template,
            dtype=getattr(torch, run.dtype),
            device=device or run.device,
            seed=run.seed,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        compared, wrong = compare_runs(named, again)
        count += compared
        findings += wrong
    return count, findings


def compare_runs(recorded: Sequence[TaskResult], again: TaskRun) -> tuple[int, list[Finding]]:
    """(scores compared, what does not reproduce) of tasks that were run twice."""
    found = {task.name: task for task in again.tasks}
    count, findings = 0, []
    for old in recorded:
        new = found[old.name]
        if old.items_sha256 != new.items_sha256:
            problem = "asks other items here than those that were measured (built-in ones depend on the Python)."
            findings.append(Finding("metrics", f"task {old.name}", problem, "verify with the same task."))
            continue
        values = {(metric.metric, metric.filter): metric for metric in new.metrics}
        for metric in old.metrics:
            count += 2
            findings += _differing(old, metric, values.get((metric.metric, metric.filter)))
    return count, findings


def _differing(task: TaskResult, old: MetricResult, new: MetricResult | None) -> list[Finding]:
    where = f"task {task.name} {old.metric}"
    if new is None:
        return [Finding("metrics", where, "is not measured here.", _FIX)]
    findings = []
    for what in ("float_value", "quantized_value"):
        before, now = getattr(old, what), getattr(new, what)
        if not math.isclose(before, now, rel_tol=0.0, abs_tol=(ITEMS + 0.5) / task.items * max(1.0, abs(now))):
            problem = f"is {now:.6g} here, not {before:.6g} ({ITEMS} of {task.items} items may differ)."
            findings.append(Finding("metrics", f"{where} {what}", problem, _FIX))
    flips = [(p.right_to_wrong, p.wrong_to_right) if (p := metric.paired) else None for metric in (old, new)]
    if flips[0] != flips[1] and not findings and _apart(flips):
        problem = f"lost and won items are {flips[1]} here, not {flips[0]}."
        findings.append(Finding("metrics", f"{where} flips", problem, _FIX))
    return findings


def _apart(flips: Sequence[tuple[int | None, int | None] | None]) -> bool:
    """Whether two counts of flips differ by more than what rounding may turn over."""
    old, new = flips
    if old is None or new is None or None in old or None in new:
        return True
    return any(abs((a or 0) - (b or 0)) > ITEMS for a, b in zip(old, new, strict=True))
