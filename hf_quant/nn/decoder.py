"""Which decoders the fused native path can run: Llama-like models recognised by class and by what they consist of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_quant.errors import KernelError
from hf_quant.kernels.native import NativePrepared
from hf_quant.kernels.native_decoder import HEAD_DIM_STEP, MAX_HEAD_DIM
from hf_quant.kernels.native_library import DTYPES
from hf_quant.nn.linear import QuantLinear

# transformers.models.NAME.modeling_NAME: the prefix of its classes. All of them compute x += o(attention(norm(x))),
# x += down(silu(gate(norm(x))) * up(norm(x))), with the rotation of Llama; their differences are read from attributes.
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
# frequencies that do not depend on the length of the sequence
_STATIC_ROPES = ("default", "linear", "llama3", "yarn")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTIONS = ("sdpa", "eager")  # implementations that compute what the native code computes


def family_of(module: nn.Module) -> str | None:
    """The family whose decoder (``LlamaModel``, not a subclass of it) a module is; None when it is none."""
    parts = type(module).__module__.split(".")
    if len(parts) != 4 or parts[:2] != ["transformers", "models"] or parts[3] != f"modeling_{parts[2]}":
        return None
    prefix = FAMILIES.get(parts[2])
    return parts[2] if prefix is not None and type(module).__name__ == f"{prefix}Model" else None


def decoders(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module of a model that :func:`family_of` knows, with its name."""
    return ((name, module) for name, module in model.named_modules() if family_of(module))


@dataclass(frozen=True)
class LayerParts:
    """The modules of one decoder layer that hold parameters."""

    linears: tuple[QuantLinear, ...]  # q, k, v, o, gate, up, down
    norms: tuple[Any, ...]  # input, post; q, k where there are any
    scaling: float
    rotary: bool


@dataclass(frozen=True)
class Parts:
    """A decoder taken apart.

    Attributes:
        layers: one entry per layer.
        final: the norm after them.
        dtype: of activations, norms, biases and cache.
        sizes: hidden, intermediate, heads, kv_heads, head_dim.
    """

    layers: tuple[LayerParts, ...]
    final: Any
    dtype: torch.dtype
    sizes: tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Refusal:
    """Why a decoder does not run fused: what is wrong, per layer name ("" for the decoder itself)."""

    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        first, reason = next(iter(self.reasons.items()))
        more = f" ({len(self.reasons)} such layers)" if len(self.reasons) > 1 else ""
        return f"{first}: {reason}{more}" if first else reason


def take_apart(decoder: Any) -> Parts | Refusal:
    """The parts of a decoder of a known family, or why the fused path cannot run it."""
    family = family_of(decoder)
    assert family is not None
    prefix, config = FAMILIES[family], decoder.config
    layers = list(decoder.layers)
    reason = _refuse_decoder(decoder, prefix, len(layers))
    if reason:
        return Refusal({"": reason})
    reasons = {}
    for i, layer in enumerate(layers):
        reason = _refuse_layer(layer, prefix, i)
        if reason:
            reasons[f"layers.{i}"] = reason
    if reasons:
        return Refusal(reasons)
    attention, mlp = layers[0].self_attn, layers[0].mlp
    dtype = layers[0].input_layernorm.weight.dtype
    head_dim = attention.head_dim
    sizes = (
        config.hidden_size,
        mlp.gate_proj.out_features,
        attention.q_proj.out_features // head_dim,
        attention.k_proj.out_features // head_dim,
        head_dim,
    )
    parts = Parts(tuple(_parts(layer) for layer in layers), decoder.norm, dtype, sizes)
    reasons = {f"layers.{i}": reason for i, p in enumerate(parts.layers) if (reason := _refuse_sizes(p, parts))}
    if reasons:
        return Refusal(reasons)
    return parts


def _refuse_decoder(decoder: Any, prefix: str, count: int) -> str | None:
    config, rope = decoder.config, decoder.rotary_emb
    if count == 0 or count != config.num_hidden_layers:
        return f"it has {count} layers and its config says {config.num_hidden_layers}"
    if type(rope).__name__ != f"{prefix}RotaryEmbedding" or rope.rope_type not in _STATIC_ROPES:
        return (
            f"rotary embeddings of type {getattr(rope, 'rope_type', type(rope).__name__)} follow the sequence's length"
        )
    if type(decoder.norm).__name__ != f"{prefix}RMSNorm":
        return f"its norm is a {type(decoder.norm).__name__}"
    head_dim = decoder.layers[0].self_attn.head_dim if hasattr(decoder.layers[0], "self_attn") else 0
    if 2 * rope.inv_freq.numel() != head_dim:
        return f"it rotates {2 * rope.inv_freq.numel()} of {head_dim} dimensions"
    return None


def _refuse_layer(layer: Any, prefix: str, index: int) -> str | None:
    if type(layer).__name__ != f"{prefix}DecoderLayer":
        return f"it is a {type(layer).__name__}"
    attention, mlp = layer.self_attn, layer.mlp
    if type(attention).__name__ != f"{prefix}Attention" or attention.layer_idx != index:
        return f"its attention is a {type(attention).__name__}"
    if type(mlp).__name__ != f"{prefix}MLP":
        return f"its feed-forward part is a {type(mlp).__name__}"
    if type(mlp.act_fn).__name__ not in ("SiLUActivation", "SiLU"):
        return f"its activation is {type(mlp.act_fn).__name__}, not SiLU"
    # Mistral reads its window from the config, the others from the layer
    window = getattr(attention, "sliding_window", attention.config.sliding_window if prefix == "Mistral" else None)
    if window is not None:
        return f"its attention has a sliding window of {window}"
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, *_head_norms(attention)):
        if type(norm).__name__ != f"{prefix}RMSNorm":
            return f"one of its norms is a {type(norm).__name__}"
    for parent, names in ((attention, _ATTENTION), (mlp, _MLP)):
        for name in names:
            reason = _refuse_linear(getattr(parent, name), layer.input_layernorm.weight.dtype)
            if reason:
                return f"{name} {reason}"
    return None


def _refuse_linear(linear: nn.Module, dtype: torch.dtype) -> str | None:
    if type(linear) is not QuantLinear:
        return f"is a {type(linear).__name__}"
    if linear.weight.device.type != "cpu":
        return f"is on {linear.weight.device.type}"
    if dtype not in DTYPES:
        return f"has activations of {dtype}"
    if linear._ready is None:
        if linear._is_offloaded():
            return "is offloaded"
        try:
            linear.prepare(dtype)
        except KernelError as error:
            return f"has no kernel: {error.problem}"
    if linear._ready is None or not isinstance(linear._ready.prepared, NativePrepared):
        return f"runs on kernel {linear.kernel_name}, not on native"
    if linear.bias is not None and (linear.bias.dtype != dtype or not linear.bias.is_contiguous()):
        return f"has a bias of {linear.bias.dtype}, and the model is {dtype}"
    return None


def _head_norms(attention: Any) -> tuple[Any, ...]:
    names = ("q_norm", "k_norm")
    return tuple(getattr(attention, name) for name in names) if all(hasattr(attention, name) for name in names) else ()


def _parts(layer: Any) -> LayerParts:
    attention, mlp = layer.self_attn, layer.mlp
    linears = (*(getattr(attention, name) for name in _ATTENTION), *(getattr(mlp, name) for name in _MLP))
    norms = (layer.input_layernorm, layer.post_attention_layernorm, *_head_norms(attention))
    # SmolLM3 leaves the rotation out in every fourth layer
    return LayerParts(linears, norms, float(attention.scaling), bool(getattr(attention, "use_rope", True)))


def _refuse_sizes(layer: LayerParts, parts: Parts) -> str | None:
    hidden, intermediate, heads, kv_heads, head_dim = parts.sizes
    if head_dim % HEAD_DIM_STEP or head_dim > MAX_HEAD_DIM:
        return f"heads of {head_dim} dimensions are no multiple of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}"
    q, kv = heads * head_dim, kv_heads * head_dim
    attention = ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q))
    wanted = (*attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    if tuple((linear.out_features, linear.in_features) for linear in layer.linears) != wanted or heads % kv_heads:
        return "its projections do not have the sizes of the first layer"
    sizes = (hidden, hidden, head_dim, head_dim)
    for norm, size in zip((*layer.norms, parts.final), (*sizes[: len(layer.norms)], hidden), strict=True):
        weight = norm.weight
        if weight.device.type != "cpu" or weight.dtype != parts.dtype or weight.shape != (size,):
            return f"a norm of {weight.dtype} {list(weight.shape)} does not fit {parts.dtype} [{size}]"
    return None
