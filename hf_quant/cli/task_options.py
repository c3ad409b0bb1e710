"""The options of ``hf-quant evaluate`` that are about tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

PANEL = "Tasks (lm-evaluation-harness)"

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        help="Run tasks too (repeatable, or separated by commas): builtin (needs no Hub), names and patterns of "
        "lm-evaluation-harness, YAML files, directories. A YAML file may name Python functions, which are run.",
        rich_help_panel=PANEL,
    ),
]
OnlyTasks = Annotated[
    bool,
    typer.Option(
        "--only-tasks",
        help="Add tasks to the results of an earlier evaluation of the same checkpoint, and measure nothing else.",
        rich_help_panel=PANEL,
    ),
]
NumFewshot = Annotated[
    int | None,
    typer.Option(
        min=0, help="Examples before each item. [dim]Default: what the task says.[/dim]", rich_help_panel=PANEL
    ),
]
Limit = Annotated[
    float | None,
    typer.Option(help="The first N items of each task, or a share of them (below 1).", rich_help_panel=PANEL),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences per forward pass.", rich_help_panel=PANEL)]
ChatTemplate = Annotated[
    bool,
    typer.Option("--chat-template", help="Put prompts through the tokenizer's chat template.", rich_help_panel=PANEL),
]
RunUnsafeCode = Annotated[
    bool,
    typer.Option(
        "--run-unsafe-code",
        help="Allow tasks that run code which the model writes, or metrics whose code comes from the Hub.",
        rich_help_panel=PANEL,
    ),
]


def split_specs(given: Sequence[str]) -> list[str]:
    """``a,b`` as two tasks; a path with a comma in it as one."""
    return [part for text in given for part in ([text] if Path(text).exists() else text.split(",")) if part]
