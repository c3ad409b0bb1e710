"""Fast one-token steps for sampling on the CPU: a cache that never copies itself, grouped attention in packed form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "hf_quant_packed_sdpa"


class ReservedLayer(DynamicLayer):
    """Keys and values of one layer in buffers that are allocated once, for ``capacity`` positions.

    The ordinary layer joins the old and the new tensors at every step: it copies everything, each time.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads, head sizes, dtype and device of the first states ``[b, h, t, d]``."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, size = key_states.shape
        self._all_keys = key_states.new_empty(batch, heads, self.capacity, size)
        self._all_values = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states behind the old ones; returns views of all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.cumulative_length
        self.cumulative_length = stop = start + key_states.shape[-2]
        self._all_keys[:, :, start:stop] = key_states
        self._all_values[:, :, start:stop] = value_states
        self.keys, self.values = self._all_keys[:, :, :stop], self._all_values[:, :, :stop]
        return self.keys, self.values


def reserved_cache(config: Any, capacity: int) -> DynamicCache | None:
    """A cache for ``capacity`` positions, or None where the model has other layers than full attention."""
    cache = DynamicCache(config=config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [ReservedLayer(capacity) for _ in cache.layers]
    return cache


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run a model's grouped attention in packed form while it samples on the CPU; other models are left as they are.

    On the CPU, ``scaled_dot_product_attention(enable_gqa=True)`` reads the keys and values of a group once per query
    head: with one query token and 3 heads per group it took 16.5 ms where the packed form takes 3.6 (bfloat16, 64
    sequences, 256 positions).
    """
    config = model.config
    heads, groups = (getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    usable = model.device.type == "cpu" and not config.sub_configs and heads and groups and heads != groups
    if not usable or config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(_NAME, _packed)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def _packed(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """``query`` ``[b, heads, 1, d]`` as ``[b, groups, heads / groups, d]``; longer queries as transformers does it."""
    batch, heads, length, _ = query.shape
    if length != 1 or attention_mask is not None or options.get("position_bias") is not None:
        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return attended, None
    packed = query.reshape(batch, key.shape[1], -1, query.shape[-1])
    attended = torch.nn.functional.scaled_dot_product_attention(packed, key, value, scale=options.get("scaling"))
    return attended.reshape(batch, heads, 1, -1).transpose(1, 2), None
