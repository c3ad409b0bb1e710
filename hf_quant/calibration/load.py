"""One function for every source of calibration data; sources are joined with ``+``."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_quant.calibration.data import CalibrationData, in_batches
from hf_quant.calibration.generate import Progress, sample_answers, sample_text, sampling_model
from hf_quant.calibration.hub import hub_documents
from hf_quant.calibration.media import image_samples, sound_samples
from hf_quant.calibration.needs import Needs, find_needs
from hf_quant.calibration.processors import LOADING_ERRORS, Part, load_part
from hf_quant.calibration.seeing import continued, question_samples
from hf_quant.calibration.source_names import FORMS, MEDIA, SELF, existing, is_media, split_sources
from hf_quant.calibration.text import (
    Document,
    is_chat,
    read_documents,
    text_samples,
    token_stream,
    window_samples,
)
from hf_quant.errors import CalibrationError, DependencyError
from hf_quant.texts import BUILT_IN, HUB_PREFIX, load_text

logger = logging.getLogger(__name__)

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
            texts), ``file:PATH`` or a path (.txt, .md, .jsonl, .json), ``hub:NAME[@config][:split[:column]]``,
            ``images:DIR``, ``audio:DIR``, several of these joined with ``+`` (equal shares, interleaved; images with
            texts for models that answer about images); or texts, chats or batches in Python (:func:`from_texts`,
            :func:`from_batches`).
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
    rows, label = loader.rows(named)
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
    tokenizer = _processor(processor, place, "tokenizer")
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

    def rows(self, named: str) -> tuple[list[dict[str, Tensor]], str]:
        """Samples of one or several sources, and how they are recorded."""
        sources = split_sources(named)
        self._check(sources)
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
            rows, label = self._media(name, share) if is_media(name) else self._one_text(name, share)
            shares.append(rows)
            labels.append(label)
        return [row for group in zip_longest(*shares) for row in group if row is not None], "+".join(labels)

    def _check(self, sources: Sequence[str]) -> None:
        """Whether the model reads every source; raises CalibrationError."""
        needs = self.needs
        name = needs.model_class.__name__
        for source in sources:
            if is_media(source):
                kind = source.partition(":")[0]
                if needs.modality != MEDIA[kind] and not ((needs.pairs or needs.sees) and kind == "images"):
                    raise CalibrationError(
                        f"{name} reads {needs.modality}, it cannot be calibrated on {kind}.",
                        "give text, or batches of your own (from_batches).",
                    )
            elif needs.modality != "text" or needs.pairs:
                reads = "images and captions" if needs.pairs else needs.modality
                folder = "audio" if needs.modality == "audio" else "images"
                raise CalibrationError(
                    f"{name} reads {reads}, it cannot be calibrated on {source!r}.",
                    f"give a folder: {folder}:DIR, or use no data: preset fast.",
                )
        if needs.sees and not any(map(is_media, sources)):
            logger.warning(
                "%s sees images but is calibrated on text alone: layers that only images reach are quantized without "
                "data. Join a folder of images: images:DIR+%s.",
                name,
                "+".join(sources),
            )

    def _media(self, source: str, samples: int) -> tuple[list[dict[str, Tensor]], str]:
        """Samples of a folder, with the start of the answer for models that have a decoder."""
        kind, _, rest = source.partition(":")
        folder = Path(rest).expanduser()
        label = f"{kind}:{folder.name}"
        options: dict[str, Any] = {"samples": samples, "seed": self.seed, "progress": self.progress}
        if self.needs.sees:
            rows = question_samples(folder, _processor(self.processor, self.place, "processor"), **options)
            return self._answered(rows, _ANSWER_TOKENS, self.tokenizer), label
        processor = _processor(
            self.processor, self.place, "image_processor" if kind == "images" else "feature_extractor"
        )
        rows = (image_samples if kind == "images" else sound_samples)(folder, processor, **options)
        if self.needs.pairs:  # no captions are given: the text tower reads passages of the built-in texts
            halves = [self._one_text(text, max(-(-len(rows) // len(BUILT_IN)), 1))[0] for text in BUILT_IN]
            texts = [text for pair in zip_longest(*halves) for text in pair if text is not None]
            return [{**text, **row} for text, row in zip(texts, rows, strict=False)], label
        if self.needs.kind == "seq2seq":
            rows = self._answered(rows, min(self.length, _ANSWER_TOKENS))
        return rows, label

    @cached_property
    def tokenizer(self) -> Any:
        """The one given, that of the processor given, or the one beside the model."""
        return _processor(self.processor, self.place, "tokenizer")

    @cached_property
    def fitting(self) -> int:
        """Tokens per sequence: no more than the model has positions for."""
        return self.needs.fitting(self.length, self.tokenizer)

    def _one_text(self, name: str, samples: int) -> tuple[list[dict[str, Tensor]], str]:
        tokenizer, length = self.tokenizer, self.fitting
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
        path = existing(name)
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
            raise CalibrationError(f"there is no calibration source {name!r}.", f"give one of {FORMS}.")
        ids = token_stream(documents, tokenizer, enough)
        rows = window_samples(ids, self.needs, tokenizer, samples=samples, length=length, seed=self.seed, source=label)
        if name == SELF:
            rows = self._answered([{"input_ids": row["input_ids"]} for row in rows], length // 2, tokenizer)
        return rows, label

    def _answered(
        self, rows: Sequence[dict[str, Tensor]], length: int, tokenizer: Any = None
    ) -> list[dict[str, Tensor]]:
        """``rows`` with what the model answers: in ``decoder_input_ids`` (the start token and the answer without its
        last token), or of a decoder behind the question.

        Raises:
            CalibrationError: an image and a question fill all positions of a decoder.
        """
        text = self.needs.config.get_text_config(decoder=True)
        longest = getattr(text, "max_target_positions", None) or getattr(text, "max_position_embeddings", None)
        length = min(length, longest or length)
        answered: list[dict[str, Tensor]] = []
        with sampling_model(self.needs, self.model, self.directory) as sampler:
            for first in range(0, len(rows), _ANSWERS_AT_ONCE):
                for batch in in_batches(rows[first : first + _ANSWERS_AT_ONCE], _ANSWERS_AT_ONCE):
                    room = max(length, 2) if self.needs.kind == "seq2seq" else self._room(batch, length, longest)
                    found = sample_answers(sampler, self.needs, batch, room, self.seed + len(answered), tokenizer)
                    for index, ids in enumerate(found):
                        one = {k: v[index : index + 1] for k, v in batch.items()} if len(found) > 1 else dict(batch)
                        if self.needs.kind == "decoder":
                            answered.append(continued(one, ids.tolist()))
                        else:
                            answered.append({**one, "decoder_input_ids": ids[None, : max(len(ids) - 1, 1)]})
                if self.progress is not None:
                    self.progress("sample answers", len(answered), len(rows))
        return answered

    def _room(self, batch: Mapping[str, Tensor], length: int, longest: int | None) -> int:
        """Tokens that an answer may have behind an image and a question."""
        asked = batch["input_ids"].shape[1]
        room = length if longest is None else min(length, longest - asked)
        if room < 1:
            raise CalibrationError(
                f"an image and a question take {asked} tokens, {self.needs.model_class.__name__} has positions for "
                f"{longest}.",
                "let the image processor make smaller images, or calibrate on text.",
            )
        return room


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


def _processor(given: Any, place: str | Path | None, part: Part) -> Any:
    """That part of ``given``, or the one in the model's directory.

    Raises:
        CalibrationError: there is none that loads.
        DependencyError: it needs torchvision.
    """
    called = part.replace("_", " ")
    if part == "processor":  # a tokenizer alone may have been given: it sees nothing
        if getattr(given, "image_processor", None) is not None:
            return given
    elif given is not None:
        return getattr(given, part, None) or given
    if not place:
        raise CalibrationError(f"calibration needs the model's {called}.", "pass processor=...")
    try:
        return load_part(part, place)
    except DependencyError:
        raise
    except LOADING_ERRORS as error:
        raise CalibrationError(
            f"{place} has no {called} that loads: {str(error).strip().splitlines()[0]}",
            f"save the {called} beside the model, or pass processor=...",
        ) from error
