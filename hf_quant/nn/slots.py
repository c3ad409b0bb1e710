"""Where the keys and values of a call lie: in a cache of transformers that the native code writes to, or in none."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

from hf_quant.nn.growing import Addresses, GrowingLayer
from hf_quant.nn.prepared_decoder import PreparedDecoder


@dataclass
class Slots:
    """Where keys and values lie; strides in elements.

    Attributes:
        layers: of the cache; none when there is no cache.
        keys: an array of addresses, one per layer.
        values: likewise.
        past: tokens held.
        lengths: addresses of counters that the native code increases, or None.
        keep: tensors that nobody else holds.
    """

    layers: list[Any]
    keys: Any
    values: Any
    row_stride: int
    head_stride: int
    token_stride: int
    past: int
    lengths: Any = None
    keep: tuple[torch.Tensor, ...] = ()

    def advance(self, news: int) -> None:
        """Count the new tokens (the native code counts them for a static cache)."""
        if self.lengths is None:
            for layer in self.layers:
                layer.length += news


def slots_of(cache: Any, prepared: PreparedDecoder, rows: int, news: int) -> Slots | None:
    """Places for ``news`` tokens of ``rows`` rows; None for a cache of another kind or shape, or without room."""
    if cache is None:
        return _no_cache(prepared, rows, news)
    if getattr(cache, "offloading", True):
        return None
    if type(cache) is DynamicCache:
        if not cache.layers and cache.layer_class_to_replicate is DynamicLayer:
            cache.layers.extend(DynamicLayer() for _ in range(prepared.count))
        return _dynamic(cache.layers, prepared, rows, news) if len(cache.layers) == prepared.count else None
    if type(cache) is StaticCache and len(cache.layers) == prepared.count:
        return _static(cache.layers, prepared, rows, news)
    return None


def _no_cache(prepared: PreparedDecoder, rows: int, news: int) -> Slots:
    _, _, _, kv_heads, head_dim = prepared.parts.sizes
    pair = torch.empty((2, prepared.count, rows, kv_heads, news, head_dim), dtype=prepared.parts.dtype)
    kind = ctypes.c_void_p * prepared.count
    keys, values = (kind(*(store[i].data_ptr() for i in range(prepared.count))) for store in pair)
    row, head, token, _ = pair.stride()[2:]
    return Slots([], keys, values, row, head, token, 0, keep=(pair,))


def _dynamic(layers: list[Any], prepared: PreparedDecoder, rows: int, news: int) -> Slots | None:
    first = layers[0]
    addresses = first.addresses if type(first) is GrowingLayer else None
    if addresses is not None:
        length = first.length
        for layer in layers:
            if type(layer) is not GrowingLayer or layer.addresses is not addresses or layer.length != length:
                addresses = None
                break
    if addresses is None or first.room < news:
        if not _own(layers, prepared, rows, news):
            return None
        first = layers[0]
        addresses = first.addresses
    store = first.key_store
    if store.shape[0] != rows:
        return None
    row, head, token, _ = store.stride()
    return Slots(layers, addresses.keys, addresses.values, row, head, token, first.length)


def _own(layers: list[Any], prepared: PreparedDecoder, rows: int, news: int) -> bool:
    """Make every layer a GrowingLayer with room in storages of one shape; False when they hold something else."""
    if all(type(layer) in (DynamicLayer, GrowingLayer) and not layer.is_initialized for layer in layers):
        _, _, _, kv_heads, head_dim = prepared.parts.sizes
        for i in range(len(layers)):
            layers[i] = GrowingLayer.empty((rows, kv_heads, 0, head_dim), prepared.parts.dtype)
    expected = None
    for layer in layers:
        if type(layer) not in (DynamicLayer, GrowingLayer) or not layer.is_initialized:
            return False
        for tensor in (layer.keys, layer.values):
            if not _fits(tensor, prepared, rows) or expected not in (None, tensor.shape):
                return False
            expected = tensor.shape
    for i, layer in enumerate(layers):
        layers[i] = layer if type(layer) is GrowingLayer else GrowingLayer.adopt(layer)
        layers[i].own(news)
    Addresses().take(layers)
    return True


def _fits(tensor: Any, prepared: PreparedDecoder, rows: int) -> bool:
    _, _, _, kv_heads, head_dim = prepared.parts.sizes
    return (
        type(tensor) is torch.Tensor
        and tensor.dim() == 4
        and (tensor.shape[0], tensor.shape[1], tensor.shape[3]) == (rows, kv_heads, head_dim)
        and tensor.dtype == prepared.parts.dtype
        and tensor.device.type == "cpu"
        and not tensor.requires_grad
    )


def _static(layers: list[Any], prepared: PreparedDecoder, rows: int, news: int) -> Slots | None:
    if not all(type(layer) is StaticLayer for layer in layers):
        return None
    if not any(layer.is_initialized for layer in layers):
        _, _, _, kv_heads, head_dim = prepared.parts.sizes
        like = torch.empty((rows, kv_heads, 0, head_dim), dtype=prepared.parts.dtype)
        for layer in layers:
            layer.lazy_initialization(like, like)
    for layer in layers:
        if not layer.is_initialized:
            return None
        if not all(_fits(t, prepared, rows) and t.is_contiguous() for t in (layer.keys, layer.values)):
            return None
    lengths = {int(layer.cumulative_length) for layer in layers}
    past = lengths.pop()
    if lengths or past + news > layers[0].max_cache_len or layers[0].cumulative_length.dtype != torch.int64:
        return None
    kind = ctypes.c_void_p * len(layers)
    row, head, token, _ = layers[0].keys.stride()
    return Slots(
        layers,
        kind(*(layer.keys.data_ptr() for layer in layers)),
        kind(*(layer.values.data_ptr() for layer in layers)),
        row,
        head,
        token,
        past,
        kind(*(layer.cumulative_length.data_ptr() for layer in layers)),
    )
