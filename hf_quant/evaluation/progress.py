"""The progress bars of an evaluation: one line per stage, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Stages:
    """Bars for stages that run one after the other; silent when ``shown`` is false."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._progress: Progress | None = None

    def __enter__(self) -> Stages:
        if self._shown:
            console = Console(stderr=True, highlight=False)
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console,
            )
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    @contextmanager
    def stage(self, title: str, total: int = 1) -> Iterator[Callable[[], None]]:
        """A bar of ``total`` steps; yields the function that advances it by one. A stage of one step ends by itself."""
        if self._progress is None:
            yield _nothing
            return
        progress = self._progress
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)
        progress.update(task, completed=total)


def _nothing() -> None:
    pass
