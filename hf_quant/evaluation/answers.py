"""Models that answer an input: transcripts, summaries, descriptions of images; teacher-forced and generated freely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from hf_quant.calibration.generate import placeholders
from hf_quant.calibration.seeing import continued
from hf_quant.evaluation.bootstrap import increase_percent
from hf_quant.evaluation.divergence import compare_logits
from hf_quant.evaluation.encoders import logit_score
from hf_quant.evaluation.examination import AGREEMENT, KL, Case, Examination, FigureOf, Score, placed, ratio

ANSWER_TOKENS = 64
_LANGUAGES = "both models are told the language that the float model detects in a clip, and to transcribe it"
_WORDS = FigureOf("word_error", "word error of greedy answers", "share", ratio)
_TOKENS = FigureOf("token_error", "token error of greedy answers", "share", ratio)
_SAME = FigureOf("same_answer", "same greedy answer", "share")
_LOSS = FigureOf("perplexity_increase_percent", "perplexity increase", "percent", increase_percent)


class Answers(Examination):
    """The float model answers greedily; the other one is led along that answer, and also answers by itself.

    Args:
        start: token that the decoder of an encoder-decoder starts with; None for models without an encoder.
        tokenizer: for the word error; None leaves it out.
        own_text: rows bring ``decoder_input_ids`` of their own text, along which both models are led instead of along
            the answer, and whose perplexity is measured.
        longest: tokens per answer.
    """

    def __init__(
        self, start: int | None, tokenizer: Any, *, own_text: bool = False, longest: int = ANSWER_TOKENS
    ) -> None:
        self.start, self.tokenizer, self.own_text, self.longest = start, tokenizer, own_text, longest
        self.figures = (_LOSS, KL, AGREEMENT, _WORDS, _TOKENS, _SAME)
        led = "the second half of each passage, which the decoder reads" if own_text else "the float model's answers"
        self.notes = (
            f"KL and top-1 agreement along {led}",
            f"errors of greedy answers of at most {longest} tokens are edits per word or token of the float model's",
        )

    def prepare(self, reference: Any, row: Mapping[str, Tensor]) -> Case:
        """The input, the float model's answer to it, and where scoring begins."""
        inputs = {name: value for name, value in row.items() if name != "decoder_input_ids"}
        prompt = self._prompt(reference, inputs)
        answer = self._answer(reference, inputs, prompt)
        if self.own_text:
            ids = row["decoder_input_ids"]
            return Case({**inputs, "decoder_input_ids": ids[:, :-1]}, 0, answer, ids[0, 1:])
        if self.start is not None:
            led = torch.tensor([[*prompt, *answer[:-1]]])
            return Case({**inputs, "decoder_input_ids": led}, len(prompt) - 1, answer)
        return Case(continued(inputs, answer[:-1]), inputs["input_ids"].shape[1] - 1, answer)

    def score(self, case: Case, reference: Any, model: Any) -> tuple[Score, None]:
        """KL and agreement along one text, the losses on it where it is the input's own, and the answer's edits."""
        expected, actual = (
            one(**placed(case.inputs, one), use_cache=False).logits[0, case.first :].float().cpu()
            for one in (reference, model)
        )
        scores: Score = {}
        if case.targets is not None:
            _, _, log_p, log_q = compare_logits(expected, actual)
            index = case.targets.unsqueeze(-1)
            scores[_LOSS.name] = (float(-log_p.gather(-1, index).mean()), float(-log_q.gather(-1, index).mean()))
        scores |= logit_score(expected, actual)
        prompt, inputs = self._inputs(case, reference)
        found = self._answer(model, inputs, prompt)
        if self.tokenizer is not None:
            said, heard = (self.tokenizer.decode(ids, skip_special_tokens=True).split() for ids in (case.answer, found))
            scores[_WORDS.name] = (float(edits(said, heard)), float(len(said)))
        scores[_TOKENS.name] = (float(edits(case.answer, found)), float(len(case.answer)))
        scores[_SAME.name] = (float(found == case.answer),)
        return scores, None

    def _inputs(self, case: Case, reference: Any) -> tuple[list[int], dict[str, Tensor]]:
        """The prompt of the decoder and what goes with it, as before the answer was put in."""
        inputs = dict(case.inputs)
        if self.start is not None:
            led = inputs.pop("decoder_input_ids")[0].tolist()
            return (self._prompt(reference, inputs) if self.own_text else led[: case.first + 1]), inputs
        length, whole = case.first + 1, inputs["input_ids"].shape
        return [], {name: value[:, :length] if value.shape == whole else value for name, value in inputs.items()}

    def _prompt(self, reference: Any, inputs: Mapping[str, Tensor]) -> list[int]:
        """What the decoder begins with: the start token; of multilingual speech models also language and task."""
        if self.start is None:
            return []
        settings = reference.generation_config
        languages = getattr(settings, "lang_to_id", None)
        if not languages or not hasattr(reference, "detect_language"):
            return [self.start]
        if _LANGUAGES not in self.notes:
            self.notes = (*self.notes, _LANGUAGES)
        features = placed(inputs, reference)[reference.main_input_name]
        spoken = int(reference.detect_language(features, generation_config=settings)[0])
        tasks = getattr(settings, "task_to_id", None) or {}
        silent = getattr(settings, "no_timestamps_token_id", None)
        return [
            self.start,
            spoken,
            *([tasks["transcribe"]] if "transcribe" in tasks else []),
            *([silent] if silent else []),
        ]

    def _answer(self, model: Any, inputs: Mapping[str, Tensor], prompt: Sequence[int]) -> tuple[int, ...]:
        """What a model answers greedily, its end token included, without the prompt."""
        given = placed(inputs, model)
        if prompt:
            given["decoder_input_ids"] = torch.tensor([list(prompt)], device=model.device)
        settings = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=self.longest)
        if never := placeholders(model.config):  # an image that nobody gave
            settings.suppress_tokens = list(never)
        # speech models override generate with a transcription of long sounds of their own: take the plain one
        ids = GenerationMixin.generate(model, **given, generation_config=settings)[0].tolist()
        return tuple(ids[len(prompt) or inputs["input_ids"].shape[1] :])


def edits(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Insertions, deletions and replacements that turn one sequence into another (Levenshtein's distance)."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]
