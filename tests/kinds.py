"""Tiny models with random weights of every kind that is no language model, saved with the processors they need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
VOCABULARY = 392
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SEEING_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
IMAGE_TOKEN = 302  # the tokenizer has 301 tokens of its own, then comes the mask
SEEN = (303, 304, 305, 306)  # what Qwen2-VL puts for and around images


def tokenizer_of(base: PreTrainedTokenizerFast, **changes: Any) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with a mask token and an image token, each text between <s> and </s>."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=type(base.backend_tokenizer).from_str(base.backend_tokenizer.to_str()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
        **changes,
    )
    made.add_special_tokens({"mask_token": AddedToken("<mask>"), "additional_special_tokens": ["<image>"]})
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made


def _bert(kind: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(t, kind)(t.BertConfig(**TEXT, **settings))


def _halves(**settings: Any) -> dict[str, Any]:
    both = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    both |= {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": VOCABULARY}
    return {**both, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **settings}


def _clip() -> Any:
    return t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=TOWER, projection_dim=64))


def _llava() -> Any:
    text = {"model_type": "llama", **TEXT, "num_key_value_heads": 2}
    vision = {"model_type": "clip_vision_model", **TOWER, "projection_dim": 64}
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    )


def _qwen2_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {**TEXT, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"embed_dim": 64, "hidden_size": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
    tokens = dict(
        zip(("image_token_id", "vision_start_token_id", "vision_end_token_id", "video_token_id"), SEEN, strict=True)
    )
    settings = t.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    return t.Qwen2VLForConditionalGeneration(settings)


def _whisper() -> Any:
    settings = _halves(num_mel_bins=16, max_source_positions=300, max_target_positions=96, decoder_start_token_id=1)
    return t.WhisperForConditionalGeneration(
        t.WhisperConfig(**settings, suppress_tokens=None, begin_suppress_tokens=None)
    )


def _whisper_languages() -> Any:
    """A multilingual one: its generation config names languages and tasks, as those on the Hub do."""
    model = _whisper()
    model.generation_config = t.GenerationConfig(
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        decoder_start_token_id=1,
        is_multilingual=True,
        lang_to_id={"<|en|>": 303, "<|de|>": 304},
        task_to_id={"translate": 305, "transcribe": 306},
        no_timestamps_token_id=307,
    )
    return model


def _wav2vec2() -> Any:
    settings = {**TEXT, "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 4), "vocab_size": 32}
    settings |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**settings))


def _t5() -> Any:
    settings = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    settings |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    return t.T5ForConditionalGeneration(t.T5Config(**settings))


BUILDERS: dict[str, Callable[[], Any]] = {
    "bert": _bert("BertModel"),
    "bert-mlm": _bert("BertForMaskedLM"),
    "bert-classes": _bert("BertForSequenceClassification", num_labels=5),
    "bert-tokens": _bert("BertForTokenClassification", num_labels=5),
    "t5": _t5,
    "bart": lambda: t.BartForConditionalGeneration(
        t.BartConfig(**_halves(max_position_embeddings=256, decoder_start_token_id=2, forced_eos_token_id=None))
    ),
    "whisper": _whisper,
    "whisper-languages": _whisper_languages,
    "wav2vec2": _wav2vec2,
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**TOWER, num_labels=7)),
    "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**TOWER)),
    "clip": _clip,
    "siglip": lambda: t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=TOWER)),
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
}
TEXTUAL = ("bert", "bert-mlm", "bert-classes", "bert-tokens", "t5", "bart")


def save(name: str, directory: Path, base: PreTrainedTokenizerFast) -> Path:
    """Build one of :data:`BUILDERS` and save it with its tokenizer and processor; returns ``directory``."""
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0, 0.1)  # so large that every layer counts
    model.save_pretrained(directory)
    _processor(name, base).save_pretrained(directory)
    return directory


def _processor(name: str, base: PreTrainedTokenizerFast) -> Any:
    if name in TEXTUAL:
        return tokenizer_of(base)
    if name.startswith("whisper"):
        tokenizer = tokenizer_of(base)
        if name == "whisper-languages":
            names = ["<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>"]
            tokenizer.add_special_tokens({"additional_special_tokens": names})
        return t.WhisperProcessor(t.WhisperFeatureExtractor(feature_size=16, chunk_length=6), tokenizer)
    if name == "wav2vec2":
        return t.Wav2Vec2FeatureExtractor()
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    size = {"height": 32, "width": 32}
    if name in ("vit", "dinov2"):
        return ViTImageProcessorPil(size=size)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    if name == "clip":
        return t.CLIPProcessor(pixels, tokenizer_of(base))
    if name == "siglip":
        return t.SiglipProcessor(
            SiglipImageProcessorPil(size=size), tokenizer_of(base, model_input_names=["input_ids"])
        )
    tokenizer = tokenizer_of(base)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    if name == "qwen2_vl":
        return _qwen2_vl_processor(tokenizer)
    if name == "llava":
        return t.LlavaProcessor(
            pixels, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    raise ValueError(name)


class _Parts:
    """Several things saved side by side, where transformers cannot join them without torchvision."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def save_pretrained(self, directory: Path) -> None:
        """As a processor would."""
        for part in self.parts:
            part.save_pretrained(directory)


def _qwen2_vl_processor(tokenizer: PreTrainedTokenizerFast) -> _Parts:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.chat_template = SEEING_TEMPLATE
    pixels = Qwen2VLImageProcessorPil(
        patch_size=8, temporal_patch_size=2, merge_size=2, min_pixels=256, max_pixels=1024
    )
    return _Parts(pixels, tokenizer)
