"""How a model that continues no text is compared with its float model: case by case, then figures over all cases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hf_quant.errors import EvaluationError
from hf_quant.evaluation.bootstrap import Array, Bootstrap
from hf_quant.evaluation.judge import Judge
from hf_quant.evaluation.progress import Stages
from hf_quant.evaluation.results import Figure, Interval, SampleResult
from hf_quant.evaluation.samples import Samples

Score = dict[str, tuple[float, ...]]


def ratio(above: Array, below: Array) -> Array:
    """A share or a mean whose weight differs from case to case; 0 where nothing was counted."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


@dataclass(frozen=True)
class FigureOf:
    """What a figure is called, and how it is made of the means over cases."""

    name: str
    title: str
    unit: Literal["share", "nats", "percent", "number"]
    statistic: Callable[..., Array] | None = None


KL = FigureOf("kl", "KL(float ‖ quantized)", "nats", ratio)
AGREEMENT = FigureOf("top1_agreement", "top-1 agreement", "share", ratio)


@dataclass(frozen=True)
class Case:
    """One sample, ready for both models.

    Attributes:
        inputs: keyword arguments of the models' forward, one row each.
        first: where scoring begins, on the axis of positions.
        answer: tokens that the float model answers with; empty where it gives none.
        targets: tokens that are right by the text itself, int64 ``[positions]``.
        chosen: positions that are scored, bool ``[positions]``; None is all from ``first``.
    """

    inputs: Mapping[str, Tensor]
    first: int = 0
    answer: tuple[int, ...] = ()
    targets: Tensor | None = None
    chosen: Tensor | None = None


class Examination(ABC):
    """One way of comparing; the subclasses know what goes in and what comes out.

    Attributes:
        figures: what can be measured, in the order of the tables; those that no case gave a score for are left out.
        notes: what readers of the results have to know.
    """

    figures: tuple[FigureOf, ...] = ()
    notes: tuple[str, ...] = ()

    def prepare(self, reference: Any, row: Mapping[str, Tensor]) -> Case:
        """What both models will see; the float model may be asked for it."""
        return Case(row)

    @abstractmethod
    def score(self, case: Case, reference: Any, model: Any) -> tuple[Score, tuple[Tensor, Tensor] | None]:
        """Numbers of one case by the name of their figure, and both models' embeddings ``[d]`` where they have any."""

    def across(self, expected: Tensor, actual: Tensor) -> dict[str, Array]:
        """Figures of all cases together, one number per case, from both models' embeddings ``[cases, d]``."""
        return {}


@dataclass(frozen=True)
class Measured:
    """A model against the float one: per figure one or two numbers for every case, float64 ``[cases]``."""

    values: Mapping[str, tuple[Array, ...]]

    def intervals(self, figures: Sequence[FigureOf], bootstrap: Bootstrap) -> dict[str, Interval]:
        """Every figure with its 95 % interval (bootstrap over cases)."""
        return {
            figure.name: bootstrap.interval(*self.values[figure.name], statistic=figure.statistic)
            for figure in figures
            if figure.name in self.values
        }


@dataclass
class Examiner(Judge):
    """A set of samples, and how to compare models on it (a judge, see :mod:`hf_quant.evaluation.accuracy`)."""

    samples: Samples
    examination: Examination
    reference: Any = None
    cases: list[Case] = field(default_factory=list)

    def meet(self, reference: Any, stages: Stages) -> None:
        """Get to know the float model."""
        self.reference = reference
        with stages.stage(f"float model on {self.samples.name}", len(self.samples.rows)) as advance:
            for row in self.samples.rows:
                with torch.no_grad():
                    self.cases.append(self.examination.prepare(reference, row))
                advance()

    def against(self, model: Any, label: str, title: str, stages: Stages) -> list[Measured]:
        """Compare a model with the float one; raises EvaluationError when a figure is not a number."""
        scores: list[Score] = []
        vectors: list[tuple[Tensor, Tensor]] = []
        with stages.stage(f"{title} on {self.samples.name}", len(self.cases)) as advance, torch.no_grad():
            for case in self.cases:
                score, pair = self.examination.score(case, self.reference, model)
                scores.append(score)
                vectors += [] if pair is None else [pair]
                advance()
        values = {
            name: tuple(np.asarray([score[name][part] for score in scores]) for part in range(len(scores[0][name])))
            for name in scores[0]
        }
        if vectors:
            expected, actual = (torch.stack([pair[side] for pair in vectors]) for side in (0, 1))
            values |= {name: (found,) for name, found in self.examination.across(expected, actual).items()}
        for name, parts in values.items():
            if not all(np.isfinite(part).all() for part in parts):
                raise EvaluationError(
                    f"{label} gives a {name} that is not finite on {self.samples.name}.",
                    "its weights, or this dtype's range, are broken; try --dtype float32.",
                )
        return [Measured(values)]

    def result(
        self,
        measured: Measured,
        int8: Measured | None,
        floor: Measured | None,
        floor_dtype: str,
        bootstrap_samples: int,
        seed: int,
    ) -> SampleResult:
        """What is recorded."""
        bootstrap = Bootstrap(len(self.cases), bootstrap_samples, seed)
        known = self.examination.figures
        found, rounded, below = (
            {} if one is None else one.intervals(known, bootstrap) for one in (measured, int8, floor)
        )
        return SampleResult(
            name=self.samples.name,
            source=self.samples.source,
            sha256=self.samples.sha256,
            samples=len(self.cases),
            unit=self.samples.unit,
            tokens=self.samples.tokens or sum(len(case.answer) for case in self.cases),
            synthetic=self.samples.synthetic,
            noise_floor_dtype=None if floor is None else floor_dtype,
            figures=tuple(
                Figure(
                    name=figure.name,
                    title=figure.title,
                    unit=figure.unit,
                    value=found[figure.name],
                    noise_floor=below.get(figure.name),
                    int8_activations=rounded.get(figure.name),
                )
                for figure in known
                if figure.name in found
            ),
            notes=self.examination.notes,
        )


def placed(inputs: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Inputs on the model's device, floats in its dtype."""
    device = next(model.parameters()).device
    return {
        name: value.to(device, model.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }
