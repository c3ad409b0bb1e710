"""What a model is calibrated on: batches of its own keyword arguments, with their digest; split, bucketed, recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_quant.errors import CalibrationError


@dataclass(frozen=True)
class CalibrationData:
    """Batches to run a model on.

    Attributes:
        batches: keyword arguments of ``model.forward``: ``input_ids`` int64 ``[b, t]``, or ``pixel_values``,
            ``input_features`` and the like. The sequences of one batch have the same length (no padding), unless the
            batch carries an ``attention_mask`` ``[b, t]``.
        source: what the user named: ``self``, ``docs``, ``file:NAME``, ``hub:org/name``, ...
        sha256: of all tensors: names, dtypes, shapes, values and order.
        samples: sequences, images or clips.
        tokens: of ``input_ids`` that are not padding; 0 for images and audio.
        seed: that chose or sampled them.
    """

    batches: tuple[dict[str, Tensor], ...]
    source: str
    sha256: str
    samples: int
    tokens: int
    seed: int

    @classmethod
    def make(cls, batches: Iterable[Mapping[str, Any]], source: str, seed: int) -> CalibrationData:
        """Count and digest ``batches``; raises CalibrationError when there is none, or one is not made of tensors."""
        kept = tuple(dict(batch) for batch in batches)
        for number, batch in enumerate(kept):
            _check(number, batch, source)
        if not kept:
            raise CalibrationError(f"the calibration source {source!r} has no samples.", "give it at least one.")
        return cls(
            batches=kept,
            source=source,
            sha256=_digest(kept),
            samples=sum(batch_samples(batch) for batch in kept),
            tokens=sum(_tokens(batch) for batch in kept),
            seed=seed,
        )

    def split(self, held_out: int) -> tuple[CalibrationData, CalibrationData]:
        """The samples before the last ``held_out`` ones, and those; a batch is cut where the border crosses it.

        Raises:
            CalibrationError: one part would be empty, or the border crosses a batch whose tensors do not all have one
                row per sample.
        """
        if not 0 < held_out < self.samples:
            raise CalibrationError(
                f"{held_out} of the {self.samples} calibration samples of {self.source!r} cannot be held out.",
                f"hold out between 1 and {self.samples - 1}, or give more samples.",
            )
        border = self.samples - held_out
        parts: tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]] = ([], [])
        seen = 0
        for batch in self.batches:
            size = batch_samples(batch)
            first = min(max(border - seen, 0), size)
            seen += size
            if 0 < first < size:
                if any(value.dim() == 0 or len(value) != size for value in batch.values()):
                    raise CalibrationError(
                        f"a calibration batch of {self.source!r} cannot be cut: not all of its tensors have "
                        f"{size} rows.",
                        "hold out whole batches, or give batches of one sample.",
                    )
                parts[0].append({name: value[:first] for name, value in batch.items()})
                parts[1].append({name: value[first:] for name, value in batch.items()})
            else:
                parts[0 if first else 1].append(batch)
        train, held = (CalibrationData.make(part, self.source, self.seed) for part in parts)
        return train, held

    def record(self) -> dict[str, object]:
        """What provenance keeps of it: everything but the tensors."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "samples": self.samples,
            "tokens": self.tokens,
            "seed": self.seed,
        }


def batch_samples(batch: Mapping[str, Tensor]) -> int:
    """Samples in a batch: rows of ``input_ids``, or of its first tensor."""
    value = batch["input_ids"] if "input_ids" in batch else next(iter(batch.values()))
    return len(value)


def in_batches(samples: Sequence[Mapping[str, Tensor]], batch_size: int) -> list[dict[str, Tensor]]:
    """Join samples (one row each, ``[1, ...]``) of equal names and shapes, so that no batch needs padding.

    A sample with a tensor that does not have one row (patches of an image, say) is a batch of its own. The batches
    stand in the order of their first samples, so that a held-out tail is not all of one length.
    """
    open_batches: dict[tuple[object, ...], list[int]] = {}
    groups: list[list[int]] = []
    for index, sample in enumerate(samples):
        key = tuple((name, value.dtype, tuple(value.shape)) for name, value in sorted(sample.items()))
        group = open_batches.get(key)
        alone = any(value.dim() == 0 or len(value) != 1 for value in sample.values())
        if group is None or len(group) == batch_size or alone:
            group = open_batches[key] = []
            groups.append(group)
        group.append(index)
    return [{name: torch.cat([samples[i][name] for i in group]) for name in samples[group[0]]} for group in groups]


def _check(number: int, batch: Mapping[str, Any], source: str) -> None:
    wrong = [name for name, value in batch.items() if not isinstance(value, Tensor)]
    if wrong or not batch:
        what = f"whose {wrong[0]!r} is {type(batch[wrong[0]]).__name__}, not a tensor" if wrong else "that is empty"
        raise CalibrationError(
            f"calibration batch {number} of {source!r} is one {what}.",
            "give dicts of tensors: the keyword arguments of the model's forward.",
        )
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is not None and (ids.dim() != 2 or ids.is_floating_point() or not ids.numel()):
        raise CalibrationError(
            f"input_ids of calibration batch {number} of {source!r} are {ids.dtype} {list(ids.shape)}.",
            "give token ids of shape [batch, length].",
        )
    if ids is not None and mask is not None and mask.dim() == 2 and mask.shape != ids.shape:
        raise CalibrationError(
            f"attention_mask of calibration batch {number} of {source!r} has the shape {list(mask.shape)}, its "
            f"input_ids {list(ids.shape)}.",
            "give one mask value for every token.",
        )
    if batch_samples(batch) == 0 or any(not torch.isfinite(v).all() for v in batch.values() if v.is_floating_point()):
        raise CalibrationError(
            f"calibration batch {number} of {source!r} is empty or holds NaN or Inf.", "remove or repair it."
        )


def _tokens(batch: Mapping[str, Tensor]) -> int:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None:
        return 0
    return int((mask != 0).sum()) if mask is not None and mask.shape == ids.shape else ids.numel()


def _digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            value = batch[name].detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        digest.update(b"\n")
    return digest.hexdigest()
