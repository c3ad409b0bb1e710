"""Samples for models that answer about images: a question beside every image, and more tokens behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_quant.calibration.media import image_samples
from hf_quant.calibration.processors import image_prompt
from hf_quant.errors import CalibrationError

# not the question that `evaluate` asks
QUESTIONS = (
    "What is in the picture?",
    "Describe this picture in detail.",
    "Which colours and shapes are there?",
    "Is there any text in the picture? If so, what does it say?",
    "What is in the foreground, and what is behind it?",
    "Write a caption for this picture.",
    "How many things can be counted here?",
    "What could have happened just before?",
)


def question_samples(
    folder: Path, processor: Any, *, samples: int, seed: int, progress: Callable[[str, int, int], None] | None = None
) -> list[dict[str, Tensor]]:
    """One sample per image: the image and one of :data:`QUESTIONS` (in turn), as the model's processor writes them.

    Raises:
        DependencyError: Pillow is not installed.
        CalibrationError: a processor that reads no images; no images, or one that cannot be read.
    """
    if getattr(processor, "image_processor", None) is None:
        raise CalibrationError(
            f"{type(processor).__name__} reads no images.", "save the model's whole processor beside it."
        )
    prompts = cycle([image_prompt(processor, question) for question in QUESTIONS])

    def read(images: Any, return_tensors: str) -> Any:
        return processor(images=images, text=next(prompts), return_tensors=return_tensors)

    return image_samples(folder, read, samples=samples, seed=seed, progress=progress)


def continued(inputs: Mapping[str, Tensor], answer: Sequence[int]) -> dict[str, Tensor]:
    """Inputs of one row with more tokens at the end of the text; masks go on with ones, types of tokens with zeros."""
    whole = inputs["input_ids"].shape
    longer = {}
    for name, value in inputs.items():
        if value.shape == whole and not value.is_floating_point():
            more = list(answer) if name == "input_ids" else [int(name == "attention_mask")] * len(answer)
            value = torch.cat((value, torch.tensor([more], dtype=value.dtype)), dim=1)
        longer[name] = value
    return longer
