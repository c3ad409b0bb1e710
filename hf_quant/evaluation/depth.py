"""The judge of depth: layers and generated answers, measured once per model beside the windows of text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from hf_quant.evaluation import depth_layers as inside
from hf_quant.evaluation.depth_generation import (
    PROMPTS,
    Answer,
    answers,
    generation_result,
    prompt_ids,
    until_divergence,
)
from hf_quant.evaluation.depth_results import DepthResult
from hf_quant.evaluation.judge import Judge
from hf_quant.evaluation.progress import Stages
from hf_quant.evaluation.stream import LogitStream
from hf_quant.evaluation.text import Windows


@dataclass(frozen=True)
class DepthFinding:
    """What a model lost inside, and how long its answers stay with the float model's."""

    layers: inside.LayerFinding
    until: list[int]


@dataclass
class DepthJudge(Judge):
    """Meets the float model and keeps it, because both models are needed at once; finds one :class:`DepthFinding`."""

    cut: Windows
    tokenizer: Any
    answers: list[Answer] = field(default_factory=list)
    fused_experts: bool = False
    rounds: ClassVar[bool] = False  # nothing of it is recorded, and answers cost most of an evaluation
    _stream: LogitStream | None = None

    @property
    def ids(self) -> torch.Tensor:
        """The windows that layers are compared on: int64 ``[windows, length]``."""
        return self.cut.ids[: inside.WINDOWS, : inside.TOKENS]

    def meet(self, reference: Any, stages: Stages) -> None:
        """Let the float model answer."""
        self._stream = LogitStream(reference, "the reference")
        self.fused_experts = inside.has_fused_experts(reference)
        with stages.stage("answers of the float model", len(PROMPTS)) as advance:
            self.answers = answers(reference, prompt_ids(self.tokenizer), advance)

    def against(self, model: Any, label: str, title: str, stages: Stages) -> list[DepthFinding]:
        """A model against the reference, inside and in its answers."""
        assert self._stream is not None
        stream = LogitStream(model, label)
        with stages.stage(f"{title}: answers", len(self.answers)) as advance:
            until = until_divergence(stream, self.answers, advance)
        with stages.stage(f"{title}: layers", len(self.ids)) as advance:
            layers = inside.layer_errors(self._stream, stream, self.ids, advance)
        return [DepthFinding(layers, until)]

    def result(
        self, measured: DepthFinding, floor: DepthFinding | None, floor_dtype: str, samples: int, seed: int
    ) -> DepthResult:
        """The recorded form; ``samples`` and ``seed`` are those of the bootstrap."""
        return DepthResult(
            noise_floor_dtype=floor_dtype if floor is not None else None,
            layers=inside.layer_result(
                measured.layers,
                floor.layers if floor is not None else None,
                self.cut.text.name,
                self.ids,
                self.fused_experts,
                samples,
                seed,
            ),
            generation=generation_result(
                self.answers,
                measured.until,
                floor.until if floor is not None else None,
                bool(getattr(self.tokenizer, "chat_template", None)),
                samples,
                seed,
            ),
        )
