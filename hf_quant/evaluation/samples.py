"""What models other than language models are measured on: passages of text, folders of images and of sound."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from hf_quant.calibration.data import CalibrationData
from hf_quant.calibration.media import image_samples, sound_samples
from hf_quant.calibration.needs import Needs
from hf_quant.calibration.text import token_stream, window_samples
from hf_quant.errors import EvaluationError
from hf_quant.evaluation import synthetic
from hf_quant.texts import Text

MEDIA = ("images", "audio")
_CALLED = {"images": "synthetic images", "audio": "synthetic sounds"}
_UNITS = {"images": "images", "audio": "clips"}


@dataclass(frozen=True)
class Samples:
    """Samples as one model reads them.

    Attributes:
        name, source: where they come from, in short and in full.
        sha256: of all tensors.
        unit: what is counted: ``passages``, ``images``, ``clips``.
        rows: keyword arguments of the model's forward, one sample each.
        tokens: of text, all samples together.
        synthetic: made by hf-quant.
    """

    name: str
    source: str
    sha256: str
    unit: str
    rows: tuple[Mapping[str, Tensor], ...]
    tokens: int = 0
    synthetic: bool = False


def passages(text: Text, needs: Needs, tokenizer: Any, *, count: int, length: int, seed: int) -> Samples:
    """Passages of a text for an encoder or an encoder-decoder, cut as for calibration (never padded).

    Encoders get passages of ``length`` tokens, a half, a quarter and an eighth of that in turn, within their special
    tokens; encoder-decoders the first half of ``length`` tokens for the encoder and the other half for the decoder.

    Raises:
        EvaluationError: the text is too short for ``count`` of them.
    """
    ids = token_stream([text.content], tokenizer)
    rows = window_samples(ids, needs, tokenizer, samples=count, length=length, seed=seed, source=text.name)
    if len(rows) < max(count, 2):
        raise EvaluationError(
            f"text {text.name!r} has {len(ids)} tokens: {len(rows)} passages of {length} fit, {count} were asked for.",
            f"use a longer text, or {f'windows={len(rows)}' if len(rows) > 1 else 'a shorter length'}.",
        )
    return _samples(text.name, text.source, "passages", rows, seed)


def media(
    source: str | Path | None,
    kind: Literal["images", "audio"],
    processor: Callable[..., Any],
    *,
    count: int,
    seed: int,
) -> Samples:
    """Images or clips of a folder through a processor; without a folder, synthetic ones, which are called that.

    Args:
        source: ``images:DIR`` or ``audio:DIR``.
        kind: what the model reads.
        processor: an image processor or a feature extractor.
        count: samples at most.
        seed: of the choice, or of the synthetic ones.

    Raises:
        EvaluationError: another kind of source, or a single file.
        CalibrationError: the folder is missing, empty, or holds a file that cannot be read.
        DependencyError: Pillow is not installed.
    """
    read = image_samples if kind == "images" else sound_samples
    if source is None:
        make = synthetic.images if kind == "images" else synthetic.sounds
        with tempfile.TemporaryDirectory(prefix="hf-quant-") as made:
            what = make(Path(made), count, seed)
            rows = read(Path(made), processor, samples=count, seed=seed)
        return _samples(_CALLED[kind], f"synthetic: {what}, seed {seed}", _UNITS[kind], rows, seed, made_up=True)
    given, _, rest = str(source).partition(":")
    if given != kind or not rest:
        raise EvaluationError(
            f"this model reads {kind}, {str(source)!r} names none.", f"give a folder of them: {kind}:DIR."
        )
    folder = Path(rest).expanduser()
    rows = read(folder, processor, samples=count, seed=seed)
    if len(rows) < 2:
        raise EvaluationError(
            f"the folder {rest!r} has one file only.", "give at least 2: intervals need more than one."
        )
    return _samples(folder.resolve().name, f"folder of {kind}", _UNITS[kind], rows, seed)


def _samples(
    name: str, source: str, unit: str, rows: Sequence[Mapping[str, Tensor]], seed: int, made_up: bool = False
) -> Samples:
    data = CalibrationData.make(rows, name, seed)
    tokens = data.tokens if unit == "passages" else 0
    return Samples(name, source, data.sha256, unit, tuple(rows), tokens, made_up)
