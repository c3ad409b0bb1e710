"""Tiny models of many architectures and calibration batches, for tests of what walks through models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)

from hf_quant.calibration.data import CalibrationData
from hf_quant.nn.splitting import split_experts
from hf_quant.tensor import QuantizedTensor

VOCABULARY = 128
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_WHISPER = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_mel_bins": 16,
    "max_source_positions": 32,
    "max_target_positions": 32,
    "decoder_start_token_id": 1,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
# model type -> its class where that is not a causal language model, and its own settings
_KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "gpt2": (AutoModelForCausalLM, {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4}),
    "opt": (AutoModelForCausalLM, {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "falcon": (AutoModelForCausalLM, {"ffn_hidden_size": 128}),
    "qwen3": (AutoModelForCausalLM, {"head_dim": 16}),
    "gemma2": (AutoModelForCausalLM, {"head_dim": 16}),
    "gemma3_text": (AutoModelForCausalLM, {"head_dim": 16, "sliding_window": 32}),
    "bert": (AutoModel, {}),
    "albert": (AutoModel, {"embedding_size": 32, "num_hidden_layers": 3}),
    "t5": (AutoModelForSeq2SeqLM, _T5),
    "whisper": (AutoModelForSpeechSeq2Seq, _WHISPER),
    "vit": (AutoModel, {"image_size": 32, "patch_size": 8}),
    "qwen3_moe": (AutoModelForCausalLM, _EXPERTS),
    "mixtral": (AutoModelForCausalLM, {"num_local_experts": 4, "head_dim": 16}),
}


class Batches(NamedTuple):
    """The part of CalibrationData that sensitivities read."""

    batches: tuple[dict[str, torch.Tensor], ...]
    sha256: str


def _tokens(count: int = 4, length: int = 32, size: int = 2, seed: int = 0, vocabulary: int = 384) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    batches = [
        {"input_ids": torch.randint(3, vocabulary, (size, length), generator=generator)} for _ in range(count // size)
    ]
    return Batches(tuple(batches), f"{seed:064d}")


def _model(name: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    auto, settings = _KINDS.get(name, (AutoModelForCausalLM, {}))
    torch.manual_seed(seed)
    model = auto.from_config(AutoConfig.for_model(name, **{**_SIZES, **settings, **changes}), dtype=torch.float32)
    # initial weights are so small that no layer says anything; and outputs that differ from each other
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.mul_(3)
    split_experts(model)
    return model.eval()


def _batches(name: str = "llama", count: int = 8, size: int = 2, length: int = 16, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (size, length), generator=generator)
        if name == "vit":
            made.append({"pixel_values": torch.randn(size, 3, 32, 32, generator=generator)})
        elif name == "whisper":
            features = torch.randn(size, 16, 64, generator=generator)
            made.append({"input_features": features, "decoder_input_ids": ids[:, :12]})
        elif name == "t5":
            made.append({"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :12]})
        else:
            made.append({"input_ids": ids})
    return made


@torch.no_grad()
def _output(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found = model(**batch)
    return found.logits if "logits" in found else found.last_hidden_state


def _error(
    model: nn.Module, tensors: Mapping[str, QuantizedTensor], batches: Sequence[dict[str, torch.Tensor]]
) -> float:
    exact = [_output(model, batch) for batch in batches]
    kept = {name: model.get_parameter(f"{name}.weight").data for name in tensors}
    try:
        for name, tensor in tensors.items():
            value = tensor.dequantize()
            transposed = type(model.get_submodule(name)).__name__ == "Conv1D"
            model.get_parameter(f"{name}.weight").data = value.t().contiguous() if transposed else value
        found = [_output(model, batch) for batch in batches]
    finally:
        for name, value in kept.items():
            model.get_parameter(f"{name}.weight").data = value
    return sum(float((a - b).square().sum()) for a, b in zip(exact, found, strict=True))


@pytest.fixture(scope="session")
def token_batches() -> Callable[..., Batches]:
    """``token_batches(count=4, length=32, size=2, seed=0)``: random token ids in batches of ``size``."""
    return _tokens


@pytest.fixture(scope="session")
def model_of() -> Callable[..., PreTrainedModel]:
    """``model_of("llama", seed=0, **config)``: a float32 model of any of many types, of 2 layers and hidden size 64."""
    return _model


@pytest.fixture(scope="session")
def batches_of() -> Callable[..., list[dict[str, torch.Tensor]]]:
    """``batches_of("llama", count=8, size=2, length=16, seed=0)``: random inputs of a :func:`model_of`."""
    return _batches


@pytest.fixture(scope="session")
def data_of() -> Callable[..., CalibrationData]:
    """``data_of("llama", count=8, ...)``: the same as calibration data."""
    return lambda name="llama", **options: CalibrationData.make(_batches(name, **options), "numbers", 0)


@pytest.fixture(scope="session")
def output_of() -> Callable[..., torch.Tensor]:
    """``output_of(model, batch)``: its logits or last hidden states."""
    return _output


@pytest.fixture(scope="session")
def error_of() -> Callable[..., float]:
    """``error_of(model, tensors, batches)``: squared error of its outputs, layers having these weights meanwhile."""
    return _error
