"""What each kind of model is measured on, and by whom: the one place where kinds of models part."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hf_quant.calibration.needs import Needs, find_needs
from hf_quant.calibration.processors import Part, image_prompt
from hf_quant.errors import EvaluationError, HfQuantError
from hf_quant.evaluation.answers import Answers
from hf_quant.evaluation.classifiers import Classes, Pairs, caption_inputs
from hf_quant.evaluation.encoders import Masked, Pooling, States
from hf_quant.evaluation.examination import Examination, Examiner
from hf_quant.evaluation.judge import Judge
from hf_quant.evaluation.kinds import Kind, Measure
from hf_quant.evaluation.reference_cache import ReferenceCache
from hf_quant.evaluation.samples import Samples, media, passages
from hf_quant.evaluation.sources import Origin, load_beside, load_tokenizer
from hf_quant.evaluation.text import BUILT_IN, Text, Windows, cut_windows, load_text
from hf_quant.evaluation.windows import CachedWindowJudge, WindowJudge

logger = logging.getLogger(__name__)

QUESTION = "Describe the image."
# (windows, tokens) where nothing is asked for; windows are images or clips where there are no tokens.
_SIZES: dict[Measure, tuple[int, int]] = {"causal": (16, 512), "text-to-text": (16, 256), "speech": (16, 0)}
_SIZE = (128, 128)
_SEEN_IMAGES = 8  # of models that describe them


@dataclass(frozen=True)
class Request:
    """What the caller of ``evaluate`` asks to be measured on; None is the default of the kind of model."""

    texts: Sequence[str | Path | Text] | None
    media: str | Path | None
    windows: int | None
    length: int | None
    seed: int
    tokenizer: Any
    processor: Any


@dataclass(frozen=True)
class Panel:
    """The judges of one evaluation.

    Attributes:
        windows, length: per text or set of samples.
        cuts: windows of text, for models that continue it.
        examiners: everything else.
        tokenizer: of the windows.
    """

    windows: int
    length: int
    cuts: tuple[Windows, ...] = ()
    examiners: list[Examiner] = field(default_factory=list)
    tokenizer: Any = None

    def judges(self, cache: ReferenceCache | None) -> list[Judge]:
        """All of them; those of windows come first, with one finding per text. ``cache`` is of the float model."""
        if not self.cuts:
            return [*self.examiners]
        return [WindowJudge(self.cuts) if cache is None else CachedWindowJudge(self.cuts, cache), *self.examiners]


def make_panel(request: Request, reference: Origin, candidate: Origin) -> Panel:
    """Find samples and judges for a model.

    Raises:
        EvaluationError: two models of different kinds, texts or a folder that are missing or too short, or that the
            model does not read; no tokenizer or processor.
        CalibrationError, DependencyError: a folder or a file in it that cannot be read.
    """
    kind = reference.kind
    if kind.measure != candidate.kind.measure:
        raise EvaluationError(
            f"{candidate.label} is loaded by {candidate.kind.auto_class}, {reference.label} by {kind.auto_class}.",
            "compare a model with the float model that it was made from.",
        )
    needs = find_needs(reference.model, reference.directory)
    assert kind.measure is not None
    windows, length = _SIZES.get(kind.measure, _SIZES["causal"] if kind.answers_text else _SIZE)
    windows, length = request.windows or windows, request.length or length
    return _Maker(request, reference, candidate, kind, needs, windows, length).panel()


@dataclass(frozen=True)
class _Maker:
    """The settings of one :func:`make_panel`."""

    request: Request
    reference: Origin
    candidate: Origin
    kind: Kind
    needs: Needs
    windows: int
    length: int

    def panel(self) -> Panel:
        reads = "" if self.kind.reads == "text" else self.kind.reads
        seen = reads or ("images" if self.kind.measure in ("pairs", "image-text") else "")
        if self.request.media is not None and not seen:
            raise EvaluationError(
                f"{self.reference.label} reads text, {str(self.request.media)!r} is of no use to it.", "give texts."
            )
        if self.request.texts is not None and (reads or self.kind.measure == "pairs"):
            raise EvaluationError(
                f"{self.reference.label} reads {seen}, not texts.", f"give a folder: {seen}:DIR (media)."
            )
        length = 0 if reads or self.kind.measure == "pairs" else self.length
        if self.kind.answers_text:
            cuts = tuple(
                cut_windows(text, self.tokenizer, self.windows, length, self.request.seed) for text in self.texts()
            )
            examiners = [] if self.kind.measure == "causal" else self.described()
            return Panel(self.windows, length, cuts, examiners, self.tokenizer)
        if seen:
            samples = self.media("images" if seen == "images" else "audio", self.reader(seen))
            return Panel(self.windows, 0, (), [Examiner(samples, self.examination())])
        length = self.needs.fitting(length, self.tokenizer)
        found = [
            passages(text, self.needs, self.tokenizer, count=self.windows, length=length, seed=self.request.seed)
            for text in self.texts()
        ]
        return Panel(self.windows, length, (), [Examiner(samples, self.examination()) for samples in found])

    def texts(self) -> list[Text]:
        """The texts asked for, each by a name of its own."""
        asked = BUILT_IN if self.request.texts is None else self.request.texts
        loaded = [text if isinstance(text, Text) else load_text(text) for text in asked]
        if not loaded:
            raise EvaluationError("there is no text to measure on.", f"give at least one, such as {BUILT_IN[0]}.")
        names = [text.name for text in loaded]
        for name in names:
            if names.count(name) > 1:
                raise EvaluationError(f"two texts are called {name!r}.", "rename one of the files.")
        return loaded

    def examination(self) -> Examination:
        """How models of this kind are compared."""
        seed = self.request.seed
        if self.kind.measure == "states":
            return States(Pooling.read(self.reference.directory) if self.kind.reads == "text" else None)
        if self.kind.measure == "masked":
            tokenizer = self.tokenizer
            if tokenizer.mask_token_id is None:
                raise EvaluationError(f"the tokenizer of {self.reference.label} has no mask token.", "set mask_token.")
            return Masked(tokenizer.mask_token_id, frozenset(tokenizer.all_special_ids), seed)
        if self.kind.measure == "pairs":
            return Pairs(caption_inputs(self.tokenizer))
        if self.kind.measure == "text-to-text":
            return Answers(self.needs.start_token, self.tokenizer, own_text=True)
        if self.kind.measure == "speech":
            return Answers(self.needs.start_token, self.tokenizer)
        return Classes()

    def described(self) -> list[Examiner]:
        """Images that a model answers about; without a folder and a processor none, which the log says."""
        try:
            processor = self.part("processor")
            if getattr(processor, "image_processor", None) is None:
                raise EvaluationError(f"the processor of {self.reference.label} reads no images.", "pass processor=...")
        except HfQuantError as error:
            if self.request.media is not None:
                raise
            logger.warning("%s is measured on text alone: %s", self.candidate.label, error)
            return []
        prompt = image_prompt(processor, QUESTION)

        def read(images: Any, return_tensors: str) -> Any:
            return processor(images=images, text=prompt, return_tensors=return_tensors)

        samples = self.media("images", read, min(self.windows, _SEEN_IMAGES))
        return [Examiner(samples, Answers(None, processor.tokenizer))]

    def media(self, kind: Literal["images", "audio"], reader: Callable[..., Any], count: int | None = None) -> Samples:
        """Samples of the folder, or synthetic ones."""
        return media(self.request.media, kind, reader, count=count or self.windows, seed=self.request.seed)

    @cached_property
    def tokenizer(self) -> Any:
        """The one given, that of the processor given, or the one beside the models."""
        given = self.request.tokenizer or getattr(self.request.processor, "tokenizer", None)
        return given if given is not None else load_tokenizer(self.reference, self.candidate)

    def reader(self, seen: str) -> Any:
        """The image processor or the feature extractor."""
        if seen == "images":
            return self.part("image_processor")
        return self.part("feature_extractor")

    def part(self, part: Part) -> Any:
        """A part of the processor that was given, the processor itself, or one that lies beside the models."""
        given = self.request.processor
        if given is not None:
            return getattr(given, part, None) or given
        return load_beside(part, self.reference, self.candidate)
