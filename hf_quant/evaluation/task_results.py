"""What task runs leave in ``evaluation.json``: scores of both models, item by item, and how they were got."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Paired(_Strict):
    """Both models on the same items.

    Attributes:
        items: that both models have a value of.
        difference: quantized minus float, in the metric's own units.
        stderr: of the difference: what one standard deviation of it would be over other items of this kind. Smaller
            than the two models' own standard errors suggest, because they mostly agree.
        right_to_wrong: items that only the float model has right; None where items are not just right or wrong.
        wrong_to_right: items that only the quantized model has right.
        p_value: exact and two-sided: how often fair coins would split the flipped items at least this unevenly
            (McNemar's test in its binomial form). None where items are not just right or wrong.
    """

    items: int
    difference: float
    stderr: float | None
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None
    p_value: float | None = None


class MetricResult(_Strict):
    """One metric of a task or group.

    Attributes:
        metric: lm-evaluation-harness's name: ``acc``, ``acc_norm``, ``exact_match``, ``perplexity``, ...
        filter: how answers were read from the output (``none`` where there is one way only).
        float_stderr, quantized_stderr: over items; None with fewer than two items.
        recovery_percent: quantized / float, or float / quantized where lower is better; None where that divides by 0.
        recovery_stderr: paired, in percent too.
    """

    metric: str
    filter: str
    higher_is_better: bool
    float_value: float
    float_stderr: float | None
    quantized_value: float
    quantized_stderr: float | None
    recovery_percent: float | None
    recovery_stderr: float | None
    paired: Paired | None


class TaskResult(_Strict):
    """One task.

    Attributes:
        source: where the task came from: ``lm-eval``, ``hf-quant`` (built in), or the name of a YAML file.
        dataset, dataset_config, split: what its items are; no dataset where Python code made them.
        version: as the task states it.
        config_sha256: of the task's whole configuration as it ran, with the source of its Python functions.
        items_sha256: of all items, their prompts and their targets, in order, as both models saw them.
        runs_code: the task names Python functions of its own.
        num_fewshot: as it ran (a task can insist on none).
        items: measured, of ``items_available``.
    """

    name: str
    source: str
    dataset: str | None
    dataset_config: str | None
    split: str | None
    version: str
    config_sha256: str
    items_sha256: str
    runs_code: bool
    output_type: str
    num_fewshot: int
    items: int
    items_available: int
    metrics: tuple[MetricResult, ...]


class GroupResult(_Strict):
    """The mean over a group's tasks, as the group defines it; standard errors take the tasks as independent."""

    name: str
    tasks: tuple[str, ...]
    metrics: tuple[MetricResult, ...]


class TaskRun(_Strict):
    """Tasks that were run together, float and quantized side by side.

    Attributes:
        created: UTC, ISO 8601.
        versions: of lm-eval and of what it computes with.
        dtype: of both models.
        kernels: layers per kernel of the quantized model.
        num_fewshot: asked for; None leaves it to each task.
        limit: items per task (a share of them below 1); None is all.
        chat_template: prompts went through the tokenizer's chat template.
        seed: of the choice of few-shot examples, and of everything else that a task draws.
    """

    created: str
    versions: dict[str, str]
    dtype: str
    device: str
    kernels: dict[str, int]
    num_fewshot: int | None
    limit: float | None
    batch_size: int
    chat_template: bool
    seed: int
    tasks: tuple[TaskResult, ...]
    groups: tuple[GroupResult, ...] = ()
    command: str | None = None


def merged(before: Sequence[TaskRun], new: TaskRun) -> tuple[TaskRun, ...]:
    """Runs with ``new`` added: what was measured again is replaced, the rest stays with how it was measured."""
    again = {task.name for task in new.tasks}
    groups_again = {group.name for group in new.groups}
    kept = []
    for run in before:
        tasks = tuple(task for task in run.tasks if task.name not in again)
        if not tasks:
            continue
        left = {task.name for task in tasks}
        groups = tuple(g for g in run.groups if g.name not in groups_again and left.issuperset(g.tasks))
        kept.append(run.model_copy(update={"tasks": tasks, "groups": groups}))
    return (*kept, new)


def headline(run: TaskRun) -> list[tuple[TaskResult | GroupResult, MetricResult]]:
    """(task or group, metric) in the order of a table: groups, then the tasks that are in none."""
    covered = {name for group in run.groups if group.metrics for name in group.tasks}
    shown: list[TaskResult | GroupResult] = [*run.groups]
    shown += (task for task in run.tasks if task.name not in covered)
    return [(item, metric) for item in shown for metric in item.metrics]


def items_of(run: TaskRun, item: TaskResult | GroupResult) -> int:
    """How many items a task or a group has."""
    if isinstance(item, TaskResult):
        return item.items
    return sum(task.items for task in run.tasks if task.name in item.tasks)


def label_of(item: TaskResult | GroupResult, metric: MetricResult) -> str:
    """``acc_norm``, ``exact_match (strict-match)``, with the few-shot examples where there are any: ``acc, 5-shot``."""
    name = metric.metric if metric.filter == "none" else f"{metric.metric} ({metric.filter})"
    shots = item.num_fewshot if isinstance(item, TaskResult) else 0
    return f"{name}, {shots}-shot" if shots else name
