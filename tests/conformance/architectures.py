"""The architectures that hf-quant is tried on from end to end: tiny models with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)

VOCABULARY = 384
IMAGE = 30  # token id
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Architecture:
    """One row of the support matrix.

    Attributes:
        name: for people.
        model_type: as in config.json.
        family: heading of the matrix.
        settings: of its config.
        auto: class that makes the model.
        inputs: makes the keyword arguments of its forward.
        config: of :class:`hf_quant.HfQuantConfig`, beside a fast method.
        generates: whether ``generate`` is tried.
        why: of the config, where it is not the default.
    """

    name: str
    model_type: str
    family: str
    settings: Mapping[str, Any]
    auto: Any = AutoModelForCausalLM
    inputs: Callable[[], dict[str, torch.Tensor]] = field(default=lambda: {"input_ids": ids()})
    config: Mapping[str, Any] = field(default_factory=dict)
    generates: bool = True
    why: str = ""

    def build(self) -> PreTrainedModel:
        """The float model (float32, eval), the same every time, with weights so large that every layer counts."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.model_type, **self.settings)
        model: PreTrainedModel = self.auto.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.data.normal_(0, 0.1)
        return model.eval()


def ids(length: int = 12) -> torch.Tensor:
    """Two rows of token ids."""
    return torch.randint(40, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def noise(*shape: int) -> torch.Tensor:
    """Pixels or sound."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _text(**changes: Any) -> dict[str, Any]:
    base = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **TOKENS,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def _decoder(name: str, model_type: str, **changes: Any) -> Architecture:
    return Architecture(name, model_type, "Decoders", _text(**changes))


def _experts(name: str, model_type: str, **changes: Any) -> Architecture:
    return Architecture(name, model_type, "Mixtures of experts", _text(**changes))


def _encoder(name: str, model_type: str, **changes: Any) -> Architecture:
    settings = _text(num_key_value_heads=None, **changes)
    return Architecture(name, model_type, "Encoders", settings, AutoModel, generates=False)


_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_HALVES = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_HALVES |= {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": VOCABULARY, **TOKENS}
_ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_PIXELS = "pixel_values"


def _image(name: str, model_type: str, settings: Mapping[str, Any], **inputs: torch.Tensor) -> Architecture:
    def made() -> dict[str, torch.Tensor]:
        return {_PIXELS: noise(2, 3, 32, 32), **inputs}

    return Architecture(name, model_type, "Vision", settings, AutoModel, made, generates=False)


def _seeing_ids(images: int) -> torch.Tensor:
    found = ids(16 + images)
    found[:, 2 : 2 + images] = IMAGE
    return found


CASES: tuple[Architecture, ...] = (
    _decoder("Llama", "llama"),
    _decoder("Mistral", "mistral", sliding_window=None),
    _decoder("Qwen2", "qwen2"),
    _decoder("Qwen3", "qwen3", head_dim=16),
    _decoder("Gemma 2", "gemma2", head_dim=16, sliding_window=64),
    _decoder("Gemma 3", "gemma3_text", head_dim=16, sliding_window=64),
    _decoder("Phi", "phi"),
    _decoder("Phi-3", "phi3", original_max_position_embeddings=128),
    Architecture(
        "GPT-2",
        "gpt2",
        "Decoders",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_inner": 128,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            **TOKENS,
        },
        config={"grid": "nf4"},
        why="compressed-tensors has no transposed layers",
    ),
    _decoder("OPT", "opt", ffn_dim=128, word_embed_proj_dim=64, intermediate_size=None, num_key_value_heads=None),
    _decoder("GPT-NeoX", "gpt_neox", num_key_value_heads=None),
    _decoder("Falcon", "falcon", num_key_value_heads=None, intermediate_size=None, ffn_hidden_size=128),
    _decoder("BLOOM", "bloom", n_head=4, n_layer=2, num_key_value_heads=None, intermediate_size=None),
    _decoder("StableLM", "stablelm"),
    _decoder("SmolLM3", "smollm3"),
    _decoder("Cohere", "cohere"),
    _decoder("OLMo 2", "olmo2"),
    _decoder("Granite", "granite"),
    _experts("Mixtral", "mixtral", num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    _experts("Qwen3-MoE", "qwen3_moe", num_experts=4, **_ROUTED),
    _experts("Qwen2-MoE (shared expert)", "qwen2_moe", num_experts=4, shared_expert_intermediate_size=32, **_ROUTED),
    _experts("GPT-OSS", "gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    _experts(
        "DeepSeek-V3",
        "deepseek_v3",
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        num_key_value_heads=4,
    ),
    _experts("Granite-MoE", "granitemoe", num_local_experts=4, num_experts_per_tok=2),
    _experts(
        "Llama 4", "llama4_text", num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=64, head_dim=16
    ),
    _encoder("BERT", "bert"),
    _encoder("DistilBERT", "distilbert", dim=64, hidden_dim=128, n_layers=2, n_heads=4),
    _encoder("RoBERTa", "roberta"),
    _encoder("ModernBERT", "modernbert", global_attn_every_n_layers=1, local_attention=16),
    Architecture(
        "T5",
        "t5",
        "Encoder-decoders",
        {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
        AutoModelForSeq2SeqLM,
        lambda: {"input_ids": ids(), "decoder_input_ids": ids(6)},
    ),
    Architecture(
        "BART",
        "bart",
        "Encoder-decoders",
        {**_HALVES, "max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None},
        AutoModelForSeq2SeqLM,
        lambda: {"input_ids": ids(), "decoder_input_ids": ids(6)},
    ),
    Architecture(
        "Whisper",
        "whisper",
        "Speech",
        {**_HALVES, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32}
        | {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
        AutoModelForSpeechSeq2Seq,
        lambda: {"input_features": noise(2, 16, 64), "decoder_input_ids": ids(6)},
        generates=False,
    ),
    Architecture(
        "Wav2Vec2",
        "wav2vec2",
        "Speech",
        {**_text(num_key_value_heads=None), "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 4)}
        | {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
        AutoModel,
        lambda: {"input_values": noise(2, 1600)},
        generates=False,
    ),
    _image("ViT", "vit", _TOWER),
    _image("DINOv2", "dinov2", _TOWER),
    _image(
        "CLIP",
        "clip",
        {"text_config": _text(num_key_value_heads=None), "vision_config": _TOWER, "projection_dim": 64},
        input_ids=ids(),
    ),
    _image(
        "SigLIP",
        "siglip",
        {"text_config": _text(num_key_value_heads=None), "vision_config": _TOWER},
        input_ids=ids(),
    ),
    Architecture(
        "LLaVA",
        "llava",
        "Vision-language",
        {
            "text_config": {"model_type": "llama", **_text()},
            "vision_config": {"model_type": "clip_vision_model", **_TOWER, "projection_dim": 64},
            "image_token_index": IMAGE,
        },
        AutoModelForImageTextToText,
        lambda: {"input_ids": _seeing_ids(16), _PIXELS: noise(2, 3, 32, 32)},
        config={"skip": ["model.vision_tower"]},
        why="the vision tower is left in float by choice",
    ),
    Architecture(
        "Qwen2-VL",
        "qwen2_vl",
        "Vision-language",
        {
            "text_config": _text(
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
            ),
            "vision_config": {"embed_dim": 64, "hidden_size": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
            | {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2},
            "image_token_id": IMAGE,
        },
        AutoModelForImageTextToText,
        lambda: {
            "input_ids": _seeing_ids(4),
            "mm_token_type_ids": (_seeing_ids(4) == IMAGE).int(),
            _PIXELS: noise(32, 3 * 2 * 8 * 8),
            "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        },
    ),
)
