"""What a comparison found: an entry per checkpoint, and which of them no other one beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from hf_quant.evaluation.results import Environment, Interval, Protocol


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Loss(_Strict):
    """How far a checkpoint is from the float model on one text or set of samples.

    Attributes:
        name: of the text or the samples.
        sha256: of what was read.
        value: the figure that :attr:`Comparison.loss` names; lower is better.
        noise_floor: of the float model in 16 bits against itself; None where it was not measured.
    """

    name: str
    sha256: str
    value: Interval
    noise_floor: Interval | None = None


class Entry(_Strict):
    """One checkpoint.

    Attributes:
        name: its directory's name, unique within the comparison.
        format: the quantization method that its config names; ``float`` without one.
        digest: of the manifest, where hf-quant made it.
        disk_bytes: files of weights.
        bits_per_weight: over its quantized weights.
        losses: one per text or set of samples.
        agreement: share (0 to 1) of the same most likely token, mean over the texts; None where it was not measured.
        decode_tokens_per_second: at batch 1; of models that continue no text the samples per second.
        speed_ratio: that, over the float model's in the same run; None in a comparison that took no float model along.
        measured: ``recorded`` in its evaluation.json, or ``here``.
    """

    name: str
    format: str
    digest: str | None
    disk_bytes: int
    bits_per_weight: float
    losses: tuple[Loss, ...]
    agreement: float | None
    decode_tokens_per_second: float | None
    speed_ratio: float | None
    measured: Literal["recorded", "here"]

    @property
    def loss(self) -> float:
        """Mean over texts or samples."""
        return sum(loss.value.value for loss in self.losses) / len(self.losses)

    @property
    def floor(self) -> float | None:
        """Mean noise floor; None unless all have one."""
        floors = [loss.noise_floor.value for loss in self.losses if loss.noise_floor is not None]
        return sum(floors) / len(floors) if len(floors) == len(self.losses) else None


class Comparison(_Strict):
    """Everything in ``compare.json``.

    Attributes:
        reference: the float model's name.
        float_disk_bytes: its files of weights.
        loss: what the losses are: ``KL(float ‖ quantized), nats per token`` for models that continue text.
        speed_unit: ``tokens`` or what samples are called.
        one_run: all speeds are of one run, models in turns; else each is of its own run.
        entries: in the order given.
    """

    schema_version: Literal[1] = 1
    created: str
    reference: str
    float_disk_bytes: int
    loss: str
    speed_unit: str
    protocol: Protocol
    environment: Environment
    one_run: bool
    entries: tuple[Entry, ...]

    def accurate(self) -> list[bool]:
        """Per entry: no other one has both fewer (or as many) bytes and less (or as much) loss, one of them truly."""
        return front([(entry.disk_bytes, entry.loss) for entry in self.entries])

    def speeds(self) -> list[float | None]:
        """What the plot of speed shows: tokens per second of one run, else the ratios to the float model."""
        return [e.decode_tokens_per_second if self.one_run else e.speed_ratio for e in self.entries]

    def fast(self) -> list[bool]:
        """Likewise for bytes and speed; False where there is no speed."""
        known = {i: speed for i, speed in enumerate(self.speeds()) if speed is not None}
        best = front([(self.entries[i].disk_bytes, -speed) for i, speed in known.items()])
        flags = dict(zip(known, best, strict=True))
        return [flags.get(i, False) for i in range(len(self.entries))]


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are on the Pareto front when both coordinates should be small; equal points share it."""

    def beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

    return [not beaten(point) for point in points]
