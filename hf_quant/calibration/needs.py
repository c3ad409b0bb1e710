"""What a model reads: text, images or sound; as a decoder, an encoder or an encoder-decoder; and how much at once."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hf_quant.errors import CalibrationError
from hf_quant.skeleton import model_class, read_settings

logger = logging.getLogger(__name__)

_LONGEST = 1_000_000  # tokenizers without a limit give 1e30


@dataclass(frozen=True)
class Needs:
    """What the batches of a model look like.

    Attributes:
        modality: what its main input is.
        kind: ``decoder`` (causal, can generate), ``encoder``, or ``seq2seq`` (its decoder has an input of its own).
        main_input: the name of that input: ``input_ids``, ``pixel_values``, ``input_features``, ``input_values``.
        config: the model's.
        model_class: the transformers class.
    """

    modality: Literal["text", "image", "audio"]
    kind: Literal["decoder", "encoder", "seq2seq"]
    main_input: str
    config: Any
    model_class: Any

    @property
    def pairs(self) -> bool:
        """Whether every sample is an image with a text: models with a tower for each, such as CLIP."""
        towers = all(hasattr(self.model_class, f"get_{tower}_features") for tower in ("image", "text"))
        return towers and self.kind == "encoder"

    @property
    def sees(self) -> bool:
        """Whether it is a decoder of text that takes images too, such as LLaVA."""
        return self.kind == "decoder" and "pixel_values" in inspect.signature(self.model_class.forward).parameters

    @property
    def start_token(self) -> int:
        """The token that the decoder of an encoder-decoder starts with; raises CalibrationError where none is set."""
        for config in (self.config, self.config.get_text_config(decoder=True)):
            for key in ("decoder_start_token_id", "bos_token_id"):
                value = getattr(config, key, None)
                if isinstance(value, int):
                    return value
        raise CalibrationError(
            f"the config of {self.model_class.__name__} has no decoder_start_token_id.",
            "set it in config.json, or pass batches of your own with decoder_input_ids.",
        )

    def fitting(self, length: int, tokenizer: Any) -> int:
        """``length``, or as many tokens as the model has positions for (said in the log)."""
        limits = []
        text = self.config.get_text_config(decoder=self.kind == "decoder")
        for key in ("max_position_embeddings", "n_positions", "max_target_positions"):
            value = getattr(text, key, None)
            if isinstance(value, int) and value > 0:
                # Encoders of the RoBERTa family number their positions from pad_token_id + 1.
                limits.append(value - 2 if self.kind == "encoder" else value)
        if self.kind != "decoder":
            limits.append(getattr(tokenizer, "model_max_length", _LONGEST))
        limit = min([_LONGEST, *limits])
        if length > limit:
            logger.warning(
                "calibration length %d is more than %s has positions for: using %d.",
                length,
                self.model_class.__name__,
                limit,
            )
        return int(min(length, limit))


def find_needs(model: Any, directory: str | Path | None) -> Needs:
    """Look at a model, or at the config of a directory.

    Raises:
        CalibrationError: neither is given.
        CheckpointError, PlanError: no config that transformers understands.
    """
    if model is not None:
        config, found = model.config, type(model)
    elif directory is not None:
        config = read_settings(directory)
        found = model_class(config)
    else:
        raise CalibrationError("calibration data needs a model to fit.", "give its directory or the model itself.")
    main_input = str(getattr(found, "main_input_name", "input_ids"))
    modality: Literal["text", "image", "audio"] = "text"
    if main_input.startswith("pixel_values"):
        modality = "image"
    elif main_input in ("input_features", "input_values", "audio_values"):
        modality = "audio"
    kind: Literal["decoder", "encoder", "seq2seq"] = "encoder"
    if getattr(config, "is_encoder_decoder", False):
        kind = "seq2seq"
    elif modality == "text" and hasattr(found, "can_generate") and found.can_generate() and not reads_ahead(config):
        kind = "decoder"
    return Needs(modality, kind, main_input, config, found)


def reads_ahead(config: Any) -> bool:
    """Whether every token of a text sees those after it: encoders, also where transformers offers them as decoders.

    BertLMHeadModel and its like can generate; as they are trained (with a masked-language-model head), they see the
    future, unless their config says ``is_decoder``.
    """
    text = config.get_text_config()
    return text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(text, "is_decoder", False)
