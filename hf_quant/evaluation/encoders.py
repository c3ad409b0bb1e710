"""Encoders: embeddings and hidden states of the quantized model beside the float one's; masked language models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_quant.errors import EvaluationError
from hf_quant.evaluation.bootstrap import Array
from hf_quant.evaluation.divergence import compare_logits
from hf_quant.evaluation.examination import AGREEMENT, KL, Case, Examination, FigureOf, Score, placed, ratio

_MASKED_SHARE = 0.15  # as encoders were trained: Devlin et al. 2018, arXiv 1810.04805
DISTANCE = FigureOf("embedding_distance", "1 − cosine of embeddings", "number")
_MODES = ("mean", "cls", "max", "lasttoken", "mean_sqrt_len")


@dataclass(frozen=True)
class Pooling:
    """How hidden states become one embedding, as sentence-transformers records it beside a model.

    Attributes:
        modes: their embeddings are joined; ``mean`` where nothing is recorded.
        notes: what of the record is not applied.
    """

    modes: tuple[str, ...] = ("mean",)
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, directory: Path) -> Pooling:
        """From ``modules.json`` and the pooling module's config; raises EvaluationError when they cannot be read."""
        file = directory / "modules.json"
        if not file.is_file():
            return cls(notes=("embeddings are means over tokens: no pooling is recorded beside the model",))
        try:
            modules = json.loads(file.read_text(encoding="utf-8"))
            kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
            config = {}
            if "Pooling" in kinds:
                found = directory / kinds["Pooling"] / "config.json"
                config = json.loads(found.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(
                f"the pooling beside {directory.name} cannot be read: {error}.", "repair modules.json, or remove it."
            ) from error
        modes = config.get("pooling_mode") or tuple(
            mode
            for mode, key in (
                ("cls", "pooling_mode_cls_token"),
                ("max", "pooling_mode_max_tokens"),
                ("mean", "pooling_mode_mean_tokens"),
                ("mean_sqrt_len", "pooling_mode_mean_sqrt_len_tokens"),
                ("lasttoken", "pooling_mode_lasttoken"),
            )
            if config.get(key)
        )
        modes = (modes,) if isinstance(modes, str) else tuple(modes) or ("mean",)
        odd = [mode for mode in modes if mode not in _MODES]
        notes = [f"embeddings are pooled as recorded: {' and '.join(modes)}"]
        if odd:
            modes, notes = ("mean",), [f"embeddings are means over tokens: the recorded {odd[0]} is not known here"]
        left = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
        if left:
            notes.append(f"the recorded {', '.join(left)} after the pooling is not applied")
        return cls(modes, tuple(notes))

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """Hidden states ``[tokens, d]`` and their mask ``[tokens]`` to an embedding ``[d * len(modes)]``."""
        kept = states[mask.bool()]
        parts = {
            "mean": lambda: kept.mean(0),
            "cls": lambda: kept[0],
            "max": lambda: kept.amax(0),
            "lasttoken": lambda: kept[-1],
            "mean_sqrt_len": lambda: kept.sum(0) / len(kept) ** 0.5,
        }
        return torch.cat([parts[mode]() for mode in self.modes])


class States(Examination):
    """Embeddings and last hidden states of any model that gives them.

    Text is pooled as :class:`Pooling` says. Images and sound take the model's own pooled output, or the mean where it
    has none.
    """

    figures = (
        DISTANCE,
        FigureOf("state_error", "relative error of a token's hidden state", "number", ratio),
        FigureOf("neighbour_agreement", "same nearest neighbour", "share"),
        FigureOf("rank_correlation", "rank correlation of similarities", "number"),
    )

    def __init__(self, pooling: Pooling | None) -> None:
        self.pooling = pooling
        self.notes = pooling.notes if pooling is not None else ("embeddings are the model's pooled output, or a mean",)

    def score(self, case: Case, reference: Any, model: Any) -> tuple[Score, tuple[Tensor, Tensor]]:
        """1 - cosine, and the sum of ``|h - h'| / |h|`` over tokens with their number."""
        (expected, states), (actual, others) = (self._look(one, case) for one in (reference, model))
        errors = (states - others).norm(dim=-1) / states.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        scores: Score = {
            DISTANCE.name: (cosine_distance(expected, actual),),
            "state_error": (float(errors.sum()), float(errors.numel())),
        }
        return scores, (expected, actual)

    def across(self, expected: Tensor, actual: Tensor) -> dict[str, Array]:
        """Retrieval-like figures: every sample asks for its like among all others."""
        if len(expected) < 4:
            return {}
        before, after = (_similarities(vectors) for vectors in (expected, actual))
        return {
            "neighbour_agreement": (before.argmax(1) == after.argmax(1)).astype(np.float64),
            "rank_correlation": _rank_correlation(before, after),
        }

    def _look(self, model: Any, case: Case) -> tuple[Tensor, Tensor]:
        """An embedding ``[d]`` and the states ``[positions, d]``, float32 on the CPU."""
        output = model(**placed(case.inputs, model))
        states = _states(output, model).float().cpu()
        if states.dim() == 4:  # [1, d, height, width] of convolutions
            states = states.flatten(2).transpose(1, 2)
        pooled = getattr(output, "pooler_output", None)
        if self.pooling is not None:
            mask = case.inputs.get("attention_mask", torch.ones(states.shape[:2], dtype=torch.int64))
            return self.pooling(states[0], mask[0]), states[0]
        return (states[0].mean(0) if pooled is None else pooled.float().cpu().flatten()), states[0]


class Masked(Examination):
    """Masked language models: what they say of tokens that are hidden from them.

    Args:
        mask_token: the id that hides a token.
        special: ids that are never hidden.
        seed: of the choice.
    """

    figures = (KL, AGREEMENT)

    def __init__(self, mask_token: int, special: frozenset[int], seed: int) -> None:
        self.mask_token, self.special = mask_token, special
        self.generator = torch.Generator().manual_seed(seed)
        self.notes = (f"{_MASKED_SHARE:.0%} of the tokens of every passage are masked, and only those are compared",)

    def prepare(self, reference: Any, row: Mapping[str, Tensor]) -> Case:
        """Hide some tokens of a passage, at least one."""
        ids = row["input_ids"].clone()
        open_ones = [i for i, token in enumerate(ids[0].tolist()) if token not in self.special]
        order = torch.randperm(len(open_ones), generator=self.generator).tolist()
        count = max(1, round(_MASKED_SHARE * len(open_ones)))
        chosen = torch.zeros(ids.shape[1], dtype=torch.bool)
        chosen[[open_ones[i] for i in order[:count]]] = True
        ids[0, chosen] = self.mask_token
        return Case({**row, "input_ids": ids}, chosen=chosen)

    def score(self, case: Case, reference: Any, model: Any) -> tuple[Score, None]:
        """KL and agreement, summed over the masked positions."""
        inputs = case.inputs
        expected, actual = (
            one(**placed(inputs, one)).logits[0].float().cpu()[case.chosen] for one in (reference, model)
        )
        return logit_score(expected, actual), None


def logit_score(expected: Tensor, actual: Tensor) -> Score:
    """KL and top-1 agreement of logits ``[positions, classes]``: sums, and the number of positions."""
    if expected.shape != actual.shape:
        raise EvaluationError(
            f"the candidate has {actual.shape[-1]} logits per position, the reference has {expected.shape[-1]}.",
            "compare a model with the float model that it was made from.",
        )
    kl, agree, _, _ = compare_logits(expected, actual)
    count = float(kl.numel())
    return {KL.name: (float(kl.double().sum()), count), AGREEMENT.name: (float(agree.sum()), count)}


def cosine_distance(expected: Tensor, actual: Tensor) -> float:
    """1 - cosine of two vectors, computed without cancellation: half the squared distance of the unit vectors."""
    one, other = (vector.double() / vector.double().norm().clamp_min(1e-300) for vector in (expected, actual))
    return float((one - other).square().sum() / 2)


def _states(output: Any, model: Any) -> Tensor:
    states = getattr(output, "last_hidden_state", None)
    if not isinstance(states, Tensor):
        raise EvaluationError(
            f"{type(model).__name__} gives no last_hidden_state to compare.", "evaluate a model with a head instead."
        )
    return states


def _similarities(vectors: Tensor) -> Array:
    """Cosines of all pairs, float64 ``[n, n]``; -2 of a sample with itself."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    return (unit @ unit.t()).fill_diagonal_(-2).numpy()


def _rank_correlation(before: Array, after: Array) -> Array:
    """Spearman's coefficient of every row's similarities to all others, float64 ``[n]``."""
    ranks = [np.argsort(np.argsort(matrix, axis=1), axis=1)[:, :].astype(np.float64) for matrix in (before, after)]
    others = before > -2  # a sample is no neighbour of its own; it has rank 0 in both
    centred = [
        np.where(others, rank - (rank * others).sum(1, keepdims=True) / others.sum(1, keepdims=True), 0)
        for rank in ranks
    ]
    spread = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    return (centred[0] * centred[1]).sum(1) / np.maximum(spread, np.finfo(np.float64).tiny)
