"""Tasks on quantized checkpoints beside their float model: one row per checkpoint, task and metric.

usage: python scripts/bench_tasks.py DIR [DIR ...] [--reference MODEL] [--tasks builtin] [--limit 100]
                                      [--recorded] [--fill README.md]

The directories are checkpoints of hf-quant with an evaluation.json (`hf-quant evaluate`), where the tasks are added, as
`hf-quant evaluate --only-tasks` does. --recorded measures nothing and prints what is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measuring import default_model, label_of, publish  # type: ignore[import-not-found]

from hf_quant.evaluation.results import RESULTS_FILE, EvaluationResult
from hf_quant.evaluation.table import markdown_table
from hf_quant.evaluation.task_results import TaskRun
from hf_quant.evaluation.task_table import HEADER, task_rows, verdict
from hf_quant.evaluation.tasks import BATCH_SIZE, add_tasks

_MARKS = ("<!-- table:tasks -->", "<!-- /table:tasks -->")


def table(results: dict[str, EvaluationResult], model: str) -> list[str]:
    """Markdown lines: the rows, and a sentence on how they came about."""
    rows = []
    every = []
    for name, result in results.items():
        found = task_rows(result.tasks)
        every += found
        rows += [[name if i == 0 else "", *row.cells] for i, row in enumerate(found)]
    runs = [run for result in results.values() for run in result.tasks]
    note = [
        f"{model} in {_said(run.dtype for run in runs)}",
        f"lm-eval {_said(run.versions['lm-eval'] for run in runs)}",
    ]
    note += [f"{_said(_limit(run) for run in runs)}; ± is one standard error. {verdict(every)}"]
    return [*markdown_table(["checkpoint", *HEADER], rows), "", ", ".join(note)]


def _limit(run: TaskRun) -> str:
    return "all items" if run.limit is None else f"the first {run.limit:g} items of each task"


def _said(values: object) -> str:
    return " or ".join(dict.fromkeys(str(value) for value in values))  # type: ignore[attr-defined]


def main() -> None:
    """Measure or read, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--reference", type=Path, help="the float model (default: the demo's SmolLM2)")
    parser.add_argument("--tasks", default="builtin", help="separated by commas")
    parser.add_argument("--limit", type=float, help="items per task (default: all)")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--recorded", action="store_true", help="measure nothing")
    parser.add_argument("--fill", type=Path, help="write the table between the marks of this Markdown file")
    arguments = parser.parse_args()
    results = {}
    for directory in arguments.directories:
        if arguments.recorded:
            found = EvaluationResult.read(directory / RESULTS_FILE)
        else:
            found = add_tasks(
                directory,
                arguments.reference or default_model(),
                arguments.tasks.split(","),
                limit=arguments.limit,
                batch_size=arguments.batch_size,
            )
        results[directory.resolve().name] = found
    publish(table(results, label_of(arguments.reference)), None, arguments.fill, _MARKS)


if __name__ == "__main__":
    main()
