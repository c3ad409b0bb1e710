"""The card's section on tasks: a pure function of the recorded task runs."""

from __future__ import annotations

from collections.abc import Sequence

from hf_quant.card_text import code, listing, markdown, without_paths
from hf_quant.evaluation.task_results import TaskResult, TaskRun
from hf_quant.evaluation.task_table import HEADER, task_rows, verdict

_MOST_ROWS = 60
_MOST_NAMED = 12


def section(runs: Sequence[TaskRun], plot: tuple[str, str] | None = None) -> str:
    """Markdown from ``## Tasks`` on, ending in a blank line; empty without tasks.

    Args:
        runs: as recorded.
        plot: (relative path, caption) of the plot of recoveries, where there is one.
    """
    rows = task_rows(runs)
    if not rows:
        return ""
    lines = ["## Tasks", "", _row([name.capitalize() if len(name) > 1 else name for name in HEADER])]
    lines.append(f"|---|---|{'---:|' * (len(HEADER) - 2)}")
    for row in rows[:_MOST_ROWS]:
        task, metric, *figures = row.cells
        lines.append(_row([code(task, in_table=True), code(metric, in_table=True), *figures]))
    if len(rows) > _MOST_ROWS:
        lines += ["", f"… and {len(rows) - _MOST_ROWS} more in `evaluation.json`."]
    lines += [
        "",
        "Both models answered the same items, from the same prompts. Recovery is quantized / float (float / quantized "
        "where lower is better); ± is one standard error over items. The difference (quantized − float) is taken item "
        "by item: lost are items that only the float model has right, won those that only this checkpoint has right, "
        "p is the exact two-sided test that both are equally likely (McNemar).",
    ]
    if any(row.result.paired and row.result.paired.stderr == 0 for row in rows):
        lines[-1] += " ± 0 means that no item flipped: with n items, up to about 3 / n of all could (95 %)."
    if said := verdict(rows):
        lines[-1] += f" {said}"
    if plot is not None:
        lines += ["", f"![{markdown(plot[1])}]({plot[0]})"]
    for run in runs:
        lines += ["", *_how(run)]
    return "\n".join(lines) + "\n\n"


def _how(run: TaskRun) -> list[str]:
    """One list item per run: with what it was run, and on which items."""
    settings = [
        f"lm-evaluation-harness {markdown(run.versions.get('lm-eval', 'of unknown version'))}",
        f"{markdown(run.dtype)} on {markdown(run.device)}",
        f"batches of {run.batch_size}",
        _limit(run.limit),
        "prompts through the chat template" if run.chat_template else "no chat template",
        f"seed {run.seed}",
    ]
    if run.kernels:
        kernels = listing([f"{markdown(name)} ({count})" for name, count in run.kernels.items()])
        settings.append(f"kernels (layers) {kernels}")
    lines = [f"- {run.created[:10]}: {', '.join(settings)}"]
    for task in run.tasks[:_MOST_NAMED]:
        lines.append(f"  - {_task(task)}")
    if len(run.tasks) > _MOST_NAMED:
        lines.append(f"  - … and {len(run.tasks) - _MOST_NAMED} more tasks, in `evaluation.json`")
    if run.command:
        lines += ["", "  ```bash", f"  {without_paths(run.command)}", "  ```"]
    return lines


def _limit(limit: float | None) -> str:
    if limit is None:
        return "all items"
    return f"the first {100 * limit:g} % of the items" if limit < 1 else f"the first {limit:g} items of each task"


def _task(task: TaskResult) -> str:
    if task.source == "hf-quant":
        data = "made by hf-quant from its held-out texts"
    elif task.dataset is None:
        data = "data made by the task's own code"
    else:
        parts = [task.dataset, *(part for part in (task.dataset_config, task.split) if part)]
        data = f"data {code(' / '.join(parts))}"
    origin = "" if task.source in ("hf-quant", "lm-eval") else f" from {code(task.source)}"
    own = ", runs Python code of its own" if task.runs_code and task.source != "lm-eval" else ""
    return (
        f"{code(task.name)}{origin}, version {markdown(task.version)}{own}, {data}; {task.num_fewshot}-shot, "
        f"{task.items:,} of {task.items_available:,} items, SHA-256 {code(task.items_sha256[:16])}…"
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
