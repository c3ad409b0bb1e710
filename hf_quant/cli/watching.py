"""The progress of a calibrated run on stderr: sampling, layers with their error and the time left, tuning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from hf_quant.calibration import CalibrationData
from hf_quant.integrations.calibrated import Session
from hf_quant.quantize.distill import TuningStep
from hf_quant.quantize.sequential import Progress


@contextmanager
def watching(verbose: bool) -> Iterator[Session]:
    """A session whose callbacks draw bars; with ``verbose``, and where stderr is no terminal, also lines."""
    console = Console(stderr=True, highlight=False)
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
    )
    watcher = _Watcher(bars, console, verbose)
    with bars:
        yield Session(
            on_sampling=watcher.sampling, on_data=watcher.data, on_layer=watcher.layer, on_tuning=watcher.tuning
        )


class _Watcher:
    def __init__(self, bars: Bars, console: Console, verbose: bool) -> None:
        self.bars, self.console, self.verbose = bars, console, verbose
        self._tasks: dict[str, TaskID] = {}

    def sampling(self, what: str, done: int, total: int) -> None:
        self._show(what, done, total, "")

    def data(self, data: CalibrationData) -> None:
        self.console.print(
            f"calibration: {data.source}, {data.samples} samples, {data.tokens} tokens, sha256 {data.sha256[:12]}"
        )

    def layer(self, step: Progress) -> None:
        result = step.result
        error = "" if result.error is None else f"error {result.error:.2e}"
        self._show("quantize", step.done, step.total, f"{result.name}  {error}")
        if self.verbose:
            source = "from the journal" if step.resumed else f"{result.method}, {result.tokens} tokens"
            note = f"  {result.note}" if result.note else ""
            self.console.print(
                f"{step.done:>5}/{step.total}  {result.name:<48} {error:<15} {source}, "
                f"{step.remaining:.0f} s left{note}",
                soft_wrap=True,
            )

    def tuning(self, step: TuningStep) -> None:
        note = f"loss {step.loss:.4f}, held out {step.held_out:.4f} (was {step.start:.4f})"
        self._show("tune", step.step, step.steps, note)
        if self.verbose:
            self.console.print(f"tune {step.step}/{step.steps}: {note}", soft_wrap=True)

    def _show(self, title: str, done: int, total: int, note: str) -> None:
        if title not in self._tasks:
            self._tasks[title] = self.bars.add_task(title, total=total, note=note)
        self.bars.update(self._tasks[title], completed=done, total=total, note=note)
