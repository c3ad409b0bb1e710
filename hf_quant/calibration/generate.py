"""Calibration data from the model itself: text sampled from the float model, seeded; answers of encoder-decoders too.

Sampling the data from the model that is quantized: LLM-QAT (Liu et al. 2023, arXiv 2305.17888); sampling the user's
turn too, from the chat template alone: Magpie (Xu et al. 2024, arXiv 2406.08464).
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_quant.cache_name import CACHE
from hf_quant.calibration.decoding import packed_attention, reserved_cache
from hf_quant.calibration.needs import Needs
from hf_quant.calibration.turns import Script, read_chat, write_scripts
from hf_quant.errors import CalibrationError
from hf_quant.texts.windows import leading_bos

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much

_TOGETHER = 64  # sequences sampled at once: matrix products of 64 rows are bound by arithmetic, not by memory
_CACHE_BYTES = 2**30


def sample_text(
    needs: Needs,
    tokenizer: Any,
    *,
    model: PreTrainedModel | None,
    directory: str | Path | None,
    samples: int,
    length: int,
    seed: int,
    progress: Progress | None = None,
) -> Tensor:
    """Sample ``samples`` sequences of exactly ``length`` tokens at temperature 1; no padding, texts follow each other.

    Sequences start with a BOS or a seeded first word; with a chat template every second one is a conversation (see
    :mod:`hf_quant.calibration.turns`). The same on the same machine with as many threads, for the same seed.

    Args:
        needs: of a decoder.
        tokenizer: the model's.
        model: the float model; without it, it is loaded from ``directory`` (16 bits) and freed again.
        directory: of the float model.
        samples: sequences.
        length: tokens per sequence.
        seed: of everything random.
        progress: told the tokens that are sampled.

    Returns:
        int64 ``[samples, length]`` on the CPU.

    Raises:
        CalibrationError: the model cannot be loaded, lacks weights, or its logits are not numbers.
    """
    with sampling_model(needs, model, directory) as sampler:
        ends = _end_tokens(sampler, tokenizer)
        vocabulary = _vocabulary(sampler, tokenizer)
        scripts = write_scripts(
            tokenizer, read_chat(tokenizer, ends), samples, seed, ends, leading_bos(tokenizer), vocabulary
        )
        together = _sequences_at_once(sampler, length, samples)
        banned = placeholders(sampler.config)
        done = 0
        pieces = []
        for first in range(0, samples, together):
            part = scripts[first : first + together]
            start = torch.tensor([[script.due.popleft()] for script in part], device=sampler.device)

            def step(position: int, done: int = done, rows: int = len(part)) -> None:
                if progress is not None:
                    progress("sample text", done + rows * position, samples * length)

            director = _Director(part, seed + first, vocabulary, banned, step)
            options = {} if (cache := reserved_cache(sampler.config, length)) is None else {CACHE: cache}
            with packed_attention(sampler):
                pieces.append(_generate(sampler, director, length, input_ids=start, **options).cpu())
            done += len(part) * length
    return torch.cat(pieces)


def sample_answers(
    sampler: PreTrainedModel, needs: Needs, inputs: Mapping[str, Tensor], length: int, seed: int, tokenizer: Any = None
) -> list[Tensor]:
    """What a model answers to ``inputs`` (one row per sample, or a single one) at temperature 1.

    Returns:
        One int64 ``[t]`` per row: of an encoder-decoder with ``2 <= t <= length``, the start token and the answer, up
        to its end token; of a decoder with ``1 <= t <= length``, the answer alone.

    Raises:
        CalibrationError: the logits are not numbers.
    """
    ends = _end_tokens(sampler, tokenizer)
    given = "input_ids" if needs.kind == "decoder" else needs.main_input
    rows = len(inputs[given])
    plain = [Script(due=deque(), ends=frozenset()) for _ in range(rows)]
    director = _Director(plain, seed, _vocabulary(sampler, tokenizer), placeholders(sampler.config), None)
    placed = {name: value.to(sampler.device) for name, value in inputs.items()}
    for name, value in placed.items():
        if value.is_floating_point():
            placed[name] = value.to(sampler.dtype)
    before = first = 0  # tokens of the prompt; where the answer may end
    if needs.kind == "decoder":
        before = first = inputs[given].shape[1]
    else:
        placed["decoder_input_ids"] = torch.full((rows, 1), needs.start_token, device=sampler.device)
        first = 1
    ids = _generate(sampler, director, before + length, **placed).cpu()
    answers = []
    for row in ids:
        stops = [i for i, token in enumerate(row.tolist()) if i >= first and token in ends]
        answers.append(row[before : stops[0] + 1] if stops else row[before:])
    return answers


@contextmanager
def sampling_model(
    needs: Needs, model: PreTrainedModel | None, directory: str | Path | None
) -> Iterator[PreTrainedModel]:
    """The model in eval mode, with a blank generation config: the given one (put back as it was), or a loaded one.

    A float32 or float16 checkpoint is sampled in bfloat16: half of the memory, and what is sampled needs no more.
    """
    own = model is None
    if model is None:
        if directory is None:
            raise CalibrationError("text cannot be sampled without a model.", "give its directory or the model itself.")
        model = _load(needs, directory)
    training, generation = model.training, model.generation_config
    model.eval()
    # Unset values of a generation config are filled from the model's own (top-k, penalties, forced tokens, end tokens).
    start = needs.start_token if needs.kind == "seq2seq" else None
    model.generation_config = GenerationConfig(decoder_start_token_id=start)
    try:
        yield model
    finally:
        model.generation_config = generation
        model.train(training)
        if own:
            del model
            gc.collect()


class _Director(LogitsProcessor):
    """Samples every next token itself, or takes it from the scripts, and leaves generate no choice but that one."""

    def __init__(
        self,
        scripts: list[Script],
        seed: int,
        vocabulary: int,
        banned: tuple[int, ...],
        step: Callable[[int], None] | None,
    ) -> None:
        self.scripts = scripts
        self.generator = torch.Generator().manual_seed(seed)
        self.vocabulary = vocabulary
        self.banned = [token for token in banned if token < vocabulary]
        self.step = step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` float32 ``[b, vocabulary]`` -> 0 at the token that comes next and -inf elsewhere."""
        likely = scores[:, : self.vocabulary]
        if self.banned:
            likely[:, self.banned] = -torch.inf
        cumulative = torch.softmax(likely, dim=-1).cumsum(-1)
        total = cumulative[:, -1:]
        if not torch.isfinite(total).all():
            raise CalibrationError(
                f"the model's logits are not numbers after {input_ids.shape[1]} tokens.",
                "check its weights, or calibrate on a text: --calibration docs+prose.",
            )
        # Sampled by inverting the distribution, with random numbers of the CPU: the same on every device.
        drawn = torch.rand(len(scores), 1, generator=self.generator).to(scores.device) * total
        picks = torch.searchsorted(cumulative, drawn, right=True).clamp_(max=self.vocabulary - 1).flatten().tolist()
        chosen = [script.put(pick) for script, pick in zip(self.scripts, picks, strict=True)]
        if self.step is not None:
            self.step(input_ids.shape[1] + 1)
        fixed = torch.full_like(scores, -torch.inf)
        return fixed.scatter_(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)


def _generate(sampler: PreTrainedModel, director: _Director, length: int, **inputs: Any) -> Tensor:
    """Sequences of exactly ``length`` tokens, int64 ``[b, length]``."""
    # Whisper and its like override generate with a transcription of their own: take the plain one.
    result: Tensor = GenerationMixin.generate(
        sampler,
        logits_processor=LogitsProcessorList([director]),
        max_length=length,
        do_sample=False,
        use_cache=True,
        **inputs,
    )
    return result.to(torch.int64).clone()


def _load(needs: Needs, directory: str | Path) -> PreTrainedModel:
    stored = getattr(needs.config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    dtype = stored if stored == torch.bfloat16 or (stored == torch.float16 and torch.cuda.is_available()) else None
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, report = needs.model_class.from_pretrained(
            str(directory), dtype=dtype or torch.bfloat16, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"transformers cannot load {directory} to sample from it: {error}.",
            "check that the directory is a whole checkpoint.",
        ) from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    missing = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind) or ())
    if missing:
        raise CalibrationError(
            f"{directory} lacks {len(missing)} weights, first {missing[0]}: what it samples would be noise.",
            "download or copy the checkpoint again.",
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def _end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    text = model.config.get_text_config(decoder=True)
    found: set[int] = set()
    for owner in (tokenizer, text, model.config):
        value = getattr(owner, "eos_token_id", None)
        found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return frozenset(int(token) for token in found)


def _vocabulary(model: PreTrainedModel, tokenizer: Any) -> int:
    """Tokens that both the model and the tokenizer have: models pad their vocabulary."""
    size = int(model.config.get_text_config(decoder=True).vocab_size)
    return size if tokenizer is None else min(size, len(tokenizer))


def placeholders(config: Any) -> tuple[int, ...]:
    """Tokens that stand for an image, a video or a sound: in text alone, a multimodal model rejects them."""
    names = [f"{kind}_token_{what}" for kind in ("image", "video", "audio") for what in ("id", "index")]
    return tuple({value for name in names if isinstance(value := getattr(config, name, None), int) and value >= 0})


def _sequences_at_once(model: PreTrainedModel, length: int, samples: int) -> int:
    """As many as fit a cache of 1 GiB or of half of the model, from 8 to 64; the machine has no say in it."""
    text = model.config.get_text_config(decoder=True)
    layers, heads, width = (
        getattr(text, key, None) or 1 for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    groups = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or width // heads
    one = 2 * layers * groups * size * length * model.dtype.itemsize
    weights = sum(weight.nbytes for weight in model.parameters())
    return min(samples, _TOGETHER, max(8, max(_CACHE_BYTES, weights // 2) // one))
