"""What a model is for, told by its class: how it is loaded, what the Hub calls its task, and how it is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import transformers
from transformers.models.auto import modeling_auto as auto

from hf_quant.calibration.needs import reads_ahead

Measure: TypeAlias = Literal["causal", "image-text", "speech", "text-to-text", "masked", "classes", "pairs", "states"]


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        auto_class: the name of the transformers class that loads it.
        task: the Hub's name of what it does.
        measure: how ``evaluate`` compares it with its float model; None where there is no measure.
        reads: what its main input is.
    """

    auto_class: str
    task: str | None
    measure: Measure | None
    reads: Literal["text", "images", "audio"] = "text"

    @property
    def answers_text(self) -> bool:
        """Whether it continues plain text, token by token."""
        return self.measure in ("causal", "image-text")

    @property
    def writes_text(self) -> bool:
        """Whether it generates text, from whatever input."""
        return self.measure in ("causal", "image-text", "speech", "text-to-text")


# Classes as transformers registers them, and what they are; the first mapping that has a class wins. Models that read
# images come before plain decoders, because transformers lists some of them as both.
_KINDS: tuple[tuple[Mapping[str, Any], Kind], ...] = (
    (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        Kind("AutoModelForImageTextToText", "image-text-to-text", "image-text"),
    ),
    (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, Kind("AutoModelForCausalLM", "text-generation", "causal")),
    (
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        Kind("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition", "speech"),
    ),
    (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        Kind("AutoModelForSeq2SeqLM", "text2text-generation", "text-to-text"),
    ),
    (auto.MODEL_FOR_CTC_MAPPING_NAMES, Kind("AutoModelForCTC", "automatic-speech-recognition", "classes")),
    (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, Kind("AutoModelForMaskedLM", "fill-mask", "masked")),
    (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        Kind("AutoModelForSequenceClassification", "text-classification", "classes"),
    ),
    (
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        Kind("AutoModelForTokenClassification", "token-classification", "classes"),
    ),
    (
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        Kind("AutoModelForImageClassification", "image-classification", "classes"),
    ),
    (
        auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        Kind("AutoModelForAudioClassification", "audio-classification", "classes"),
    ),
    (
        auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        Kind("AutoModelForZeroShotImageClassification", "zero-shot-image-classification", "pairs"),
    ),
    (
        auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        Kind("AutoModelForQuestionAnswering", "question-answering", None),
    ),
    (auto.MODEL_MAPPING_NAMES, Kind("AutoModel", "feature-extraction", "states")),
    (auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, Kind("AutoModelForTextEncoding", "feature-extraction", "states")),
)
_UNKNOWN = Kind("AutoModel", None, None)


def kind_of(architecture: str, config: Any = None) -> Kind:
    """The kind of a model class.

    Args:
        architecture: the name of the class, as in ``architectures`` of config.json.
        config: of the model: for classes that come with the checkpoint (``auto_map``), for encoders that transformers
            also offers as decoders, and for encoder-decoders without a head.
    """
    kinds = [kind for mapping, kind in _KINDS if _registers(mapping, architecture)]
    if not kinds:  # code of the checkpoint's own, which mostly follows the names of transformers
        remote = getattr(config, "auto_map", None) or {}
        named = [kind for _, kind in _KINDS if kind.auto_class in remote and kind.auto_class != "AutoModel"]
        kinds = named or [
            kind for _, kind in _KINDS if architecture.endswith(kind.auto_class.removeprefix("AutoModel") or "Model")
        ]
    if config is not None and kinds and kinds[0].measure == "causal" and reads_ahead(config):
        kinds = kinds[1:] or [replace(kinds[0], measure=None)]
    found = kinds[0] if kinds else _UNKNOWN
    found = replace(found, reads=_reads(str(getattr(getattr(transformers, architecture, None), "main_input_name", ""))))
    paired = bool(getattr(config, "is_encoder_decoder", False))
    if found.measure == "states":
        task = "image-feature-extraction" if found.reads == "images" else found.task
        return replace(found, task=task, measure=None if paired else found.measure)
    if config is not None and (
        (found.measure == "speech" and not paired) or (found.measure in ("causal", "image-text") and paired)
    ):
        return replace(found, measure=None)  # audio models of another shape, and image models with an encoder for text
    return found


def _reads(main_input: str) -> Literal["text", "images", "audio"]:
    """What the input of that name holds."""
    if main_input.startswith("pixel_values"):
        return "images"
    return "audio" if main_input in ("input_features", "input_values", "audio_values") else "text"


def _registers(mapping: Mapping[str, Any], architecture: str) -> bool:
    """Whether a mapping of transformers has a class; its values are one name or several."""
    return any(architecture in ((names,) if isinstance(names, str) else names) for names in mapping.values())
