"""What the walk is given and what it gives: weights, a record, results, progress, and which of its rungs are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hf_quant.plan import PlannedLayer
from hf_quant.tensor import QuantizedTensor


class Weights(Protocol):
    """Where float weights come from, one at a time."""

    def weight(self, layer: PlannedLayer) -> torch.Tensor:
        """float32 ``[out, in]``, also of a Conv1D."""


class Record(Protocol):
    """Where quantized weights go, block by block, and where those of an earlier run are found."""

    def finished(self, unit: str) -> bool: ...

    def tensor(self, layer: str) -> QuantizedTensor: ...

    def add(self, unit: str, tensors: Mapping[str, QuantizedTensor], reports: Sequence[LayerResult]) -> None: ...


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer.

    Attributes:
        name: of the layer.
        method: how it was quantized (a layer that saw no data: data-free).
        tokens: rows that its statistics come from.
        error: |quantized - wanted|^2 / |float output|^2 on the calibration data; None without data.
        gain: squared output error that aiming at the float model removed before rounding, as a share of the squared
            output (held-out tokens).
        note: why it was not calibrated, or had to be damped; else empty.
    """

    name: str
    method: str
    tokens: int = 0
    error: float | None = None
    gain: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Progress:
    """One more layer is done."""

    result: LayerResult
    done: int
    total: int
    seconds: float
    resumed: bool = False

    @property
    def remaining(self) -> float:
        """Expected seconds to the end."""
        return self.seconds / self.done * (self.total - self.done)


@dataclass(frozen=True)
class Rungs:
    """What the walk does beyond rounding each layer for itself; all of it, unless an ablation leaves one out.

    Attributes:
        drift: aim at the float model's output on its own inputs, not at the float weight's on the quantized inputs.
        residual: also undo what earlier layers did to the residual stream.
        loudness: weigh tokens by the size of the stream that a layer adds to.
        refit: choose all scales of a row together once its codes are known.
    """

    drift: bool = True
    residual: bool = True
    loudness: bool = True
    refit: bool = True
