"""Classifiers of text, images and sound, and models that match images with captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_quant.evaluation.encoders import DISTANCE, cosine_distance, logit_score
from hf_quant.evaluation.examination import AGREEMENT, KL, Case, Examination, FigureOf, Score, placed

CAPTIONS = (
    "a photo of a person",
    "a photo of a dog",
    "a photo of a cat",
    "a photo of a bird",
    "a photo of a car",
    "a photo of a building",
    "a photo of a street",
    "a photo of a forest",
    "a photo of the sea",
    "a photo of a mountain",
    "a photo of food",
    "a photo of a flower",
    "a photo of a room",
    "a drawing",
    "a page of text",
    "an abstract pattern",
)


class Classes(Examination):
    """Class probabilities: of a whole sample, or of every token or frame of it (``logits [1, ..., classes]``)."""

    figures = (KL, AGREEMENT)

    def score(self, case: Case, reference: Any, model: Any) -> tuple[Score, None]:
        """KL and agreement of the classes."""
        expected, actual = (one(**placed(case.inputs, one)).logits for one in (reference, model))
        classes = expected.shape[-1]
        return logit_score(
            expected.float().cpu().reshape(-1, classes), actual.float().cpu().reshape(-1, actual.shape[-1])
        ), None


class Pairs(Examination):
    """Models with an image and a text tower: which of :data:`CAPTIONS` fits an image best, and both embeddings.

    Args:
        captions: the tokenized captions, as the model's forward takes them.
    """

    figures = (
        FigureOf(AGREEMENT.name, "same best caption", "share", AGREEMENT.statistic),
        FigureOf(KL.name, "KL over the captions", "nats", KL.statistic),
        FigureOf(DISTANCE.name, "1 − cosine of image embeddings", "number"),
        FigureOf("text_distance", "1 − cosine of caption embeddings", "number"),
    )
    notes = (
        f"{len(CAPTIONS)} fixed captions, from “{CAPTIONS[0]}” to “{CAPTIONS[-1]}”; they are the same for every image, "
        "so the figure of their embeddings does not vary over images",
    )

    def __init__(self, captions: Mapping[str, Tensor]) -> None:
        self.captions = captions

    def prepare(self, reference: Any, row: Mapping[str, Tensor]) -> Case:
        """The image and all captions."""
        return Case({**self.captions, **row})

    def score(self, case: Case, reference: Any, model: Any) -> tuple[Score, None]:
        """The similarities of the image and every caption as logits, and the distances of both embeddings."""
        expected, actual = (one(**placed(case.inputs, one)) for one in (reference, model))
        scores = logit_score(expected.logits_per_image.float().cpu(), actual.logits_per_image.float().cpu())
        images = [found.image_embeds[0].float().cpu() for found in (expected, actual)]
        texts = [found.text_embeds.float().cpu().reshape(len(CAPTIONS), -1) for found in (expected, actual)]
        scores[DISTANCE.name] = (cosine_distance(*images),)
        each = [cosine_distance(one, other) for one, other in zip(*texts, strict=True)]
        scores["text_distance"] = (sum(each) / len(each),)
        return scores, None


def caption_inputs(tokenizer: Any) -> dict[str, Tensor]:
    """:data:`CAPTIONS` as one batch.

    A tokenizer that makes no attention mask belongs to a model that reads its padding: there all captions have the
    full length, as in its training.
    """
    masked = "attention_mask" in tokenizer.model_input_names
    longest = tokenizer.model_max_length if tokenizer.model_max_length < 10_000 else None
    made = tokenizer(
        list(CAPTIONS),
        padding=True if masked or longest is None else "max_length",
        truncation=longest is not None,
        max_length=longest,
        return_tensors="pt",
    )
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor) and name != "token_type_ids"}
