"""One function for every source of calibration data; sources of text are joined with ``+``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from hf_quant.calibration.data import CalibrationData, in_batches
from hf_quant.calibration.generate import Progress, sample_answers, sample_text, sampling_model
from hf_quant.calibration.hub import hub_documents
from hf_quant.calibration.media import image_samples, sound_samples
from hf_quant.calibration.needs import Needs, find_needs
from hf_quant.calibration.text import (
    Document,
    is_chat,
    read_documents,
    text_samples,
    token_stream,
    window_samples,
)
from hf_quant.errors import CalibrationError
from hf_quant.texts import BUILT_IN, HUB_PREFIX, load_text

logger = logging.getLogger(__name__)

SELF = "self"
_FORMS = (
    "self, docs, prose, file:PATH, hub:NAME[@config][:split[:column]], images:DIR or audio:DIR; texts joined with +"
)
_HUB_SPREAD = 4  # read this many times the tokens that are needed, to choose from
_ANSWER_TOKENS = 128
_ANSWERS_AT_ONCE = 16


def load_calibration(
    source: str | Path | Iterable[Any],
    *,
    directory: str | Path | None,
    model: PreTrainedModel | None = None,
    processor: Any = None,
    samples: int = 64,
    length: int = 512,
    seed: int = 0,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> CalibrationData:
    """Calibration data that fits a model.

    Args:
        source: ``self`` (sampled from the float model), ``docs`` or ``prose`` (the calibration parts of the built-in
            texts), ``file:PATH`` or a path (.txt, .md, .jsonl, .json), ``hub:NAME[@config][:split[:column]]``, several
            of these joined with ``+`` (equal shares, interleaved), ``images:DIR``, ``audio:DIR``; or texts, chats or
            batches in Python (:func:`from_texts`, :func:`from_batches`).
        directory: of the float model: its config, its processor, and its weights where they are needed.
        model: the float model in memory, instead of the weights in ``directory``.
        processor: tokenizer, image processor or feature extractor (or a processor that has one); default: the
            directory's.
        samples: sequences, images or clips; fewer where the source has fewer (:attr:`CalibrationData.samples` says so).
        length: tokens per sequence; at most as many as the model has positions for.
        seed: of all choices.
        batch_size: samples per batch.
        progress: told what is being done, how much is done and of how much.

    Raises:
        CalibrationError: a source that is unknown, unreadable, too short, or not for this model.
        DependencyError: a package that the source needs is not installed.
        CheckpointError, PlanError: a directory without a usable config.
    """
    for name, value in (("samples", samples), ("length", length), ("batch_size", batch_size)):
        least = 2 if name == "length" else 1
        if value < least:
            raise CalibrationError(f"{name}={value} for calibration.", f"use at least {least}.")
    if not isinstance(source, (str, Path)):
        return _from_python(source, directory, model, processor, samples, length, seed, batch_size)
    needs = find_needs(model, directory)
    named = str(source)
    place = directory if directory is not None else getattr(needs.config, "_name_or_path", None)
    loader = _Loader(needs, model, directory, place, processor, samples, length, seed, progress)
    kind, _, rest = named.partition(":")
    if kind in ("images", "audio") and rest:
        rows = loader.media(kind, Path(rest).expanduser())
        label = f"{kind}:{Path(rest).name}"
    else:
        if needs.modality != "text" or needs.pairs:
            reads = "images and captions" if needs.pairs else needs.modality
            folder = "audio" if needs.modality == "audio" else "images"
            raise CalibrationError(
                f"{needs.model_class.__name__} reads {reads}, it cannot be calibrated on {named!r}.",
                f"give a folder: {folder}:DIR, or use no data: preset fast.",
            )
        rows, label = loader.texts(named)
    if len(rows) < samples:
        logger.warning("calibration source %s has %d samples, %d were asked for.", label, len(rows), samples)
    return CalibrationData.make(in_batches(rows, batch_size), label, seed)


def from_texts(
    texts: Iterable[Document],
    *,
    directory: str | Path | None = None,
    model: PreTrainedModel | None = None,
    processor: Any = None,
    samples: int | None = None,
    length: int = 512,
    seed: int = 0,
    batch_size: int = 4,
    source: str = "texts",
) -> CalibrationData:
    """One sequence per text or chat, cut at ``length`` tokens; texts of equal length share a batch, nothing is padded.

    Args:
        texts: strings, or chats (lists of ``{"role": ..., "content": ...}``).
        directory: of the model (its config and tokenizer).
        model: the model, instead of its directory.
        processor: its tokenizer; default: the directory's.
        samples: at most this many; default: all.
        length: tokens per sequence at most.
        seed: recorded.
        batch_size: sequences per batch at most.
        source: what provenance calls them.

    Raises:
        CalibrationError: no tokens, chats without a chat template, or a model that does not read text.
    """
    documents = list(texts)
    needs = find_needs(model, directory)
    if needs.modality != "text":
        raise CalibrationError(
            f"{needs.model_class.__name__} reads {needs.modality}, not text.", "give batches of its own inputs."
        )
    for number, document in enumerate(documents):
        if not isinstance(document, str) and not (document and is_chat(document)):
            raise CalibrationError(
                f"calibration text {number} is {type(document).__name__}.",
                "give strings, or lists of messages with role and content.",
            )
    place = directory if directory is not None else getattr(needs.config, "_name_or_path", None)
    tokenizer = _processor(processor, place, "text")
    rows = text_samples(
        documents,
        needs,
        tokenizer,
        samples=len(documents) if samples is None else samples,
        length=needs.fitting(length, tokenizer),
        source=source,
    )
    return CalibrationData.make(in_batches(rows, batch_size), source, seed)


def from_batches(batches: Iterable[Mapping[str, Tensor]], *, seed: int = 0, source: str = "batches") -> CalibrationData:
    """Batches as they are: dicts of tensors, the keyword arguments of the model's forward; raises CalibrationError."""
    return CalibrationData.make(batches, source, seed)


class _Loader:
    """The settings of one :func:`load_calibration`, and a method per kind of source."""

    def __init__(
        self,
        needs: Needs,
        model: PreTrainedModel | None,
        directory: str | Path | None,
        place: str | Path | None,
        processor: Any,
        samples: int,
        length: int,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.needs, self.model, self.directory, self.place, self.processor = needs, model, directory, place, processor
        self.samples, self.length, self.seed, self.progress = samples, length, seed, progress

    def texts(self, named: str) -> tuple[list[dict[str, Tensor]], str]:
        """Samples of one or several sources of text, and how they are recorded."""
        tokenizer = _processor(self.processor, self.place, "text")
        length = self.needs.fitting(self.length, tokenizer)
        whole = _existing(named.removeprefix("file:")) is not None  # a file may have a + in its name
        sources = [named] if whole else [part.strip() for part in named.split("+")]
        if SELF in sources and self.needs.kind == "encoder":
            logger.warning(
                "%s cannot sample text: calibrating on docs+prose instead of self.", self.needs.model_class.__name__
            )
            sources = [other for name in sources for other in (BUILT_IN if name == SELF else (name,))]
        sources = list(dict.fromkeys(sources))
        if self.samples < len(sources):
            raise CalibrationError(
                f"{self.samples} samples cannot be shared by the {len(sources)} sources of {named!r}.",
                f"use at least {len(sources)} samples.",
            )
        shares: list[list[dict[str, Tensor]]] = []
        labels = []
        for index, name in enumerate(sources):
            share = self.samples // len(sources) + (index < self.samples % len(sources))
            rows, label = self._one_text(name, tokenizer, share, length)
            shares.append(rows)
            labels.append(label)
        return [row for group in zip_longest(*shares) for row in group if row is not None], "+".join(labels)

    def media(self, kind: str, folder: Path) -> list[dict[str, Tensor]]:
        """Samples of a folder, with the start of the answer for models that have a decoder."""
        wanted = "image" if kind == "images" else "audio"
        if self.needs.modality != wanted and not (self.needs.pairs and kind == "images"):
            raise CalibrationError(
                f"{self.needs.model_class.__name__} reads {self.needs.modality}, it cannot be calibrated on {kind}.",
                "give text, or batches of your own (from_batches).",
            )
        processor = _processor(self.processor, self.place, wanted)
        read: Callable[..., list[dict[str, Tensor]]] = image_samples if kind == "images" else sound_samples
        rows = read(folder, processor, samples=self.samples, seed=self.seed, progress=self.progress)
        if self.needs.pairs:  # no captions are given: the text tower reads passages of the built-in texts
            self.samples = max(len(rows), len(BUILT_IN))
            texts, _ = self.texts("+".join(BUILT_IN))
            return [{**text, **row} for text, row in zip(texts, rows, strict=False)]
        return self._answered(rows, min(self.length, _ANSWER_TOKENS)) if self.needs.kind == "seq2seq" else rows

    def _one_text(self, name: str, tokenizer: Any, samples: int, length: int) -> tuple[list[dict[str, Tensor]], str]:
        if name == SELF and self.needs.kind == "decoder":
            sampled = sample_text(
                self.needs,
                tokenizer,
                model=self.model,
                directory=self.directory,
                samples=samples,
                length=length,
                seed=self.seed,
                progress=self.progress,
            )
            return [{"input_ids": row[None]} for row in sampled], SELF
        documents: Iterable[Document]
        enough = None
        label = name
        path = _existing(name)
        if name == SELF:  # an encoder-decoder: built-in texts to read, its own answers
            documents = [load_text(text, "calibration").content for text in BUILT_IN]
        elif name in BUILT_IN:
            documents = [load_text(name, "calibration").content]
        elif name.startswith(HUB_PREFIX):
            documents, enough = hub_documents(name), _HUB_SPREAD * samples * length
        elif path is not None or name.startswith("file:"):
            path = path or Path(name.removeprefix("file:")).expanduser()
            documents, label = read_documents(path), f"file:{path.name}"
        else:
            raise CalibrationError(f"there is no calibration source {name!r}.", f"give one of {_FORMS}.")
        ids = token_stream(documents, tokenizer, enough)
        rows = window_samples(ids, self.needs, tokenizer, samples=samples, length=length, seed=self.seed, source=label)
        if name == SELF:
            rows = self._answered([{"input_ids": row["input_ids"]} for row in rows], length // 2, tokenizer)
        return rows, label

    def _answered(
        self, rows: Sequence[dict[str, Tensor]], length: int, tokenizer: Any = None
    ) -> list[dict[str, Tensor]]:
        """``rows`` with ``decoder_input_ids``: the start token and what the model answers, without its last token."""
        text = self.needs.config.get_text_config(decoder=True)
        longest = getattr(text, "max_target_positions", None) or getattr(text, "max_position_embeddings", None)
        length = max(min(length, longest or length), 2)
        answered: list[dict[str, Tensor]] = []
        with sampling_model(self.needs, self.model, self.directory) as sampler:
            for first in range(0, len(rows), _ANSWERS_AT_ONCE):
                for batch in in_batches(rows[first : first + _ANSWERS_AT_ONCE], _ANSWERS_AT_ONCE):
                    for index, ids in enumerate(
                        sample_answers(sampler, self.needs, batch, length, self.seed + len(answered), tokenizer)
                    ):
                        one = {name: value[index : index + 1] for name, value in batch.items()}
                        answered.append({**one, "decoder_input_ids": ids[None, : max(len(ids) - 1, 1)]})
                if self.progress is not None:
                    self.progress("sample answers", len(answered), len(rows))
        return answered


def _from_python(
    source: Iterable[Any],
    directory: str | Path | None,
    model: PreTrainedModel | None,
    processor: Any,
    samples: int,
    length: int,
    seed: int,
    batch_size: int,
) -> CalibrationData:
    items = list(source)
    if items and all(isinstance(item, Mapping) for item in items):
        return from_batches(items, seed=seed)
    if not items:
        raise CalibrationError("the calibration data is an empty list.", "give texts, chats or batches.")
    return from_texts(
        items,
        directory=directory,
        model=model,
        processor=processor,
        samples=samples,
        length=length,
        seed=seed,
        batch_size=batch_size,
    )


def _existing(name: str) -> Path | None:
    path = Path(name).expanduser()
    try:
        return path if name not in (SELF, *BUILT_IN) and path.is_file() else None
    except OSError:  # longer than a path may be
        return None


def _processor(given: Any, place: str | Path | None, modality: str) -> Any:
    """The part of ``given`` that reads ``modality``, or the one in the model's directory; raises CalibrationError."""
    part, loader = {
        "text": ("tokenizer", AutoTokenizer),
        "image": ("image_processor", AutoImageProcessor),
        "audio": ("feature_extractor", AutoFeatureExtractor),
    }[modality]
    if given is not None:
        return getattr(given, part, None) or given
    if not place:
        raise CalibrationError(f"calibration needs the model's {part.replace('_', ' ')}.", "pass processor=...")
    try:
        return loader.from_pretrained(str(place), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(
            f"{place} has no {part.replace('_', ' ')} that loads: {str(error).splitlines()[0]}",
            f"save the {part.replace('_', ' ')} beside the model, or pass processor=...",
        ) from error
