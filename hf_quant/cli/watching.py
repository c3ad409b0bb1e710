"""The progress of a calibrated run on stderr: sampling, layers with their error and the time left, tuning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from hf_quant.calibration import CalibrationData
from hf_quant.cli.output import err
from hf_quant.integrations.calibrated import Session
from hf_quant.quantize.contracts import Progress
from hf_quant.quantize.distill import TuningStep
from hf_quant.quantize.fit_budget import Attempt
from hf_quant.quantize.reconstruct import Reconstruction


@contextmanager
def watching(verbose: bool) -> Iterator[Watcher]:
    """Bars while a run goes on; with ``verbose`` also lines."""
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=err,
    )
    with bars:
        yield Watcher(bars, err, verbose)


class Watcher:
    """Callbacks that draw; ``session`` holds those of a calibrated run."""

    def __init__(self, bars: Bars, console: Console, verbose: bool) -> None:
        self.bars, self.console, self.verbose = bars, console, verbose
        self._tasks: dict[str, TaskID] = {}
        self.session = Session(
            on_sampling=self.sampling,
            on_data=self.data,
            on_layer=self.layer,
            on_block=self.block,
            on_tuning=self.tuning,
        )

    def sampling(self, what: str, done: int, total: int) -> None:
        """Calibration data is being made."""
        self._show(what, done, total, "")

    def data(self, data: CalibrationData) -> None:
        """It is there."""
        self.console.print(
            f"calibration: {data.source}, {data.samples} samples, {data.tokens} tokens, sha256 {data.sha256[:12]}"
        )

    def layer(self, step: Progress) -> None:
        """A layer more."""
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

    def block(self, step: Reconstruction) -> None:
        """A block more was tuned alone."""
        note = f"{step.block}: held out {step.after:.4g} (was {step.before:.4g})"
        self._show("tune blocks", step.done, step.total, note)
        if self.verbose:
            self.console.print(f"tune blocks {step.done}/{step.total}: {note}", soft_wrap=True)

    def tuning(self, step: TuningStep) -> None:
        """An optimizer step more."""
        note = f"loss {step.loss:.4g}, held out {step.held_out:.4g} (was {step.start:.4g})"
        self._show("tune", step.step, step.steps, note)
        if self.verbose:
            self.console.print(f"tune {step.step}/{step.steps}: {note}", soft_wrap=True)

    def sensitivity(self, done: int, total: int) -> None:
        """A sample more."""
        self._show("sensitivities", done, total, "")

    def attempt(self, attempt: Attempt) -> None:
        """A budget of accuracy was tried."""
        measured, allocation = attempt.measured, attempt.allocation
        self.console.print(
            f"tried {allocation.bits_per_weight:.3f} bits: held-out KL {measured.kl:.3g}, loss "
            f"{measured.loss_increase:+.3g} ({'within' if attempt.fits else 'over'} the budget)"
        )

    def _show(self, title: str, done: int, total: int, note: str) -> None:
        if title not in self._tasks:
            self._tasks[title] = self.bars.add_task(title, total=total, note=note)
        self.bars.update(self._tasks[title], completed=done, total=total, note=note)
