"""One native call per token instead of thousands of torch ops: the forward of a Llama-like decoder while it generates.

:func:`fuse` gives the decoder of a model (``LlamaModel`` and the like) another ``forward``. It runs the native code
when a call is one that this can answer exactly (one new token per row, no gradients, a plain cache, nobody listening),
and the model's own forward for every other call. Nothing else of the model changes, and :func:`unfuse` takes it back.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from hf_quant.kernels import native_decoder, native_library
from hf_quant.nn.decoder import ATTENTIONS, Parts, Refusal, decoders, take_apart
from hf_quant.nn.forwards import StandIn
from hf_quant.nn.growing import Addresses, GrowingLayer
from hf_quant.nn.head import HeadForward, head_of
from hf_quant.nn.prepared_decoder import PreparedDecoder, Watch, noted
from hf_quant.nn.switching import enabled, switch

__all__ = ["FusedForward", "FusedReport", "describe_fused", "enabled", "fuse", "switch", "unfuse"]

MAX_ROWS = 64
_QUIET = frozenset(("use_cache", "return_dict", "output_attentions", "output_hidden_states"))


@dataclass(frozen=True)
class FusedReport:
    """Whether a decoder runs fused while it generates.

    Attributes:
        name: of the decoder in the model.
        layers: how many it has.
        fused: whether they run in one native call.
        reasons: why not, by the name of a layer ("" for the decoder itself).
    """

    name: str
    layers: int
    fused: bool
    reasons: dict[str, str]


def fuse(model: nn.Module) -> int:
    """Let every decoder of a known family, and a float output head, run natively where they can; how many decoders."""
    found = [decoder for _, decoder in decoders(model)]
    for decoder in found:
        FusedForward.put(decoder)
    if found and (head := head_of(model)) is not None:
        HeadForward.put(head)
    return len(found)


def unfuse(model: nn.Module) -> None:
    """Give every decoder and the head their own forwards back."""
    for _, decoder in decoders(model):
        FusedForward.take(decoder)
    if (head := head_of(model)) is not None:
        HeadForward.take(head)


def describe_fused(model: nn.Module) -> list[FusedReport]:
    """Which decoders of a model run fused, and why others do not; modules of unknown families are not listed."""
    reports = []
    for name, decoder in decoders(model):
        refusal = native_decoder.unavailable()
        if refusal is None and not enabled():
            refusal = "HF_QUANT_FUSED=0 or hf_quant.nn.switching.switch(False) switches it off"
        if refusal is None and not isinstance(decoder.__dict__.get("forward"), FusedForward):
            refusal = "hf_quant.fuse was not called, or something else replaced its forward"
        found = Refusal({"": refusal}) if refusal else take_apart(decoder)
        reasons = found.reasons if isinstance(found, Refusal) else {}
        reports.append(FusedReport(name, len(decoder.layers), not reasons, dict(reasons)))
    return reports


class FusedForward(StandIn):
    """The forward of one decoder: native where a call allows it, the original elsewhere."""

    def __init__(self, module: Any, before: Any = None) -> None:
        super().__init__(module, before)
        self._watch: Watch | None = None
        self._prepared: PreparedDecoder | None = None
        self._last: tuple[Any, ...] = ()  # what the last native call left: its cache, its length, and the counters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the decoder's own forward."""
        if not torch.compiler.is_compiling() and not args:
            found = self._answer(**kwargs)
            if found is not None:
                return found
        return self.__wrapped__(*args, **kwargs)

    def _answer(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast | None:
        """The output of a call that the native code can answer, None for every other; nothing is touched then."""
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if type(tokens) is not torch.Tensor or tokens.dim() < 2 or tokens.shape[1] != 1 or past_key_values is None:
            return None
        if (input_ids is None) == (inputs_embeds is None) or not 0 < tokens.shape[0] <= MAX_ROWS:
            return None
        decoder = self.module()
        if decoder is None or not _calm(decoder, others) or self.before is not None:
            return None
        prepared = self._prepared
        if prepared is None or not self._goes_on(past_key_values):
            prepared = self._current(decoder)
        if prepared is None:
            return None
        rows = tokens.shape[0]
        slots = _slots(past_key_values, prepared, rows)
        if slots is None:
            return None
        mask = _mask(attention_mask, rows, slots)
        positions = _positions(position_ids, rows, slots.past)
        if mask is None or positions is None:
            return None
        x = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if type(x) is not torch.Tensor or x.dtype != prepared.parts.dtype or x.device.type != "cpu":
            return None
        if x.shape != (rows, 1, prepared.parts.sizes[0]):
            return None
        y = _run(prepared, x.contiguous(), positions, slots, mask)
        if y is None:
            return None
        slots.advance()
        self._last = (weakref.ref(past_key_values), slots.past + 1, noted())
        return BaseModelOutputWithPast(last_hidden_state=y, past_key_values=past_key_values)

    def _goes_on(self, cache: Any) -> bool:
        """Whether this is the token after the last one, and no hook was registered and no layout changed since."""
        last = self._last
        return bool(last) and last[0]() is cache and last[1] == cache.get_seq_length() and last[2] == noted()

    def _current(self, decoder: Any) -> PreparedDecoder | None:
        """The description of the decoder as it is; None when it cannot run natively now."""
        if self._watch is not None and self._watch.same():
            return self._prepared if self._prepared is not None and self._watch.unheard() else None
        self._watch = self._prepared = None
        parts = take_apart(decoder) if native_decoder.unavailable() is None else None
        found = parts if isinstance(parts, Parts) else None
        self._prepared = None if found is None else PreparedDecoder(decoder, found)
        self._watch = Watch(decoder, found)
        return self._prepared if self._watch.unheard() else None


def _calm(decoder: Any, others: dict[str, Any]) -> bool:
    """Whether nothing about the call or the state of torch asks for more than the output."""
    if torch.is_grad_enabled() or decoder.training or not enabled():
        return False
    if torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():
        return False
    for name, value in others.items():
        if name not in _QUIET:
            if value is not None:
                return False
        elif value is not None and bool(value) != (name in ("use_cache", "return_dict")):
            return False
    config = decoder.config
    if (
        config._attn_implementation not in ATTENTIONS
        or not config.return_dict
        or not getattr(config, "is_causal", True)
    ):
        return False
    if others.get("use_cache") is None and not config.use_cache:
        return False
    return not (config.output_attentions or config.output_hidden_states)


# --- the cache -------------------------------------------------------------------------------------------------------


@dataclass
class _Slots:
    """Where keys and values lie; strides in elements."""

    layers: list[Any]
    keys: Any
    values: Any
    row_stride: int
    head_stride: int
    token_stride: int
    past: int
    lengths: Any = None

    def advance(self) -> None:
        """Count the new token (the native code counts it for a static cache)."""
        if self.lengths is None:
            for layer in self.layers:
                layer.length += 1


def _slots(cache: Any, prepared: PreparedDecoder, rows: int) -> _Slots | None:
    if getattr(cache, "offloading", True) or len(cache.layers) != prepared.count:
        return None
    if type(cache) is DynamicCache:
        return _dynamic_slots(cache.layers, prepared, rows)
    return _static_slots(cache.layers, prepared, rows) if type(cache) is StaticCache else None


def _dynamic_slots(layers: list[Any], prepared: PreparedDecoder, rows: int) -> _Slots | None:
    first = layers[0]
    addresses = first.addresses if type(first) is GrowingLayer else None
    if addresses is not None:
        length = first.length
        for layer in layers:
            if type(layer) is not GrowingLayer or layer.addresses is not addresses or layer.length != length:
                addresses = None
                break
    if addresses is None or not first.room:
        if not _own(layers, prepared, rows):
            return None
        first = layers[0]
        addresses = first.addresses
    store = first.key_store
    if store.shape[0] != rows:
        return None
    row, head, token, _ = store.stride()
    return _Slots(layers, addresses.keys, addresses.values, row, head, token, first.length)


def _own(layers: list[Any], prepared: PreparedDecoder, rows: int) -> bool:
    """Make every layer a GrowingLayer with room in storages of one shape; False when they hold something else."""
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
        layers[i].own()
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


def _static_slots(layers: list[Any], prepared: PreparedDecoder, rows: int) -> _Slots | None:
    for layer in layers:
        if type(layer) is not StaticLayer or not layer.is_initialized:
            return None
        if not all(_fits(t, prepared, rows) and t.is_contiguous() for t in (layer.keys, layer.values)):
            return None
    lengths = {int(layer.cumulative_length) for layer in layers}
    past = lengths.pop()
    if lengths or past >= layers[0].max_cache_len or layers[0].cumulative_length.dtype != torch.int64:
        return None
    kind = ctypes.c_void_p * len(layers)
    row, head, token, _ = layers[0].keys.stride()
    return _Slots(
        layers,
        kind(*(layer.keys.data_ptr() for layer in layers)),
        kind(*(layer.values.data_ptr() for layer in layers)),
        row,
        head,
        token,
        past,
        kind(*(layer.cumulative_length.data_ptr() for layer in layers)),
    )


# --- mask, positions, the call ---------------------------------------------------------------------------------------

_NO_MASK = torch.empty(0, dtype=torch.bool)


def _mask(mask: Any, rows: int, slots: _Slots) -> torch.Tensor | None:
    """``[rows, >= past + 1]``, nonzero where a token may be attended to; empty for no mask, None for another kind."""
    if isinstance(mask, dict):  # what generate makes for models that may have sliding layers
        mask = mask.get("full_attention", False)
    if mask is None:
        return _NO_MASK
    if type(mask) is not torch.Tensor or mask.device.type != "cpu":
        return None
    if mask.dim() == 4 and mask.dtype == torch.bool and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0]
        mask = mask.expand(rows, -1) if mask.shape[0] == 1 else mask
    elif mask.dim() != 2 or mask.is_floating_point():
        return None
    length = slots.past + 1
    if mask.shape[0] != rows or mask.shape[1] < length or (slots.lengths is None and mask.shape[1] != length):
        return None
    if mask.dtype not in (torch.int64, torch.bool, torch.uint8):
        mask = mask != 0
    return mask if mask.stride(1) == 1 else mask.contiguous()


def _positions(positions: torch.Tensor | None, rows: int, past: int) -> torch.Tensor | None:
    """int64 ``[rows or 1]``: the positions of the new tokens; None when they are given in another form."""
    if positions is None:
        return torch.tensor([past])
    if type(positions) is not torch.Tensor or positions.dim() != 2 or positions.shape[1] != 1:
        return None
    if positions.shape[0] not in (1, rows) or positions.dtype != torch.int64 or positions.device.type != "cpu":
        return None
    return positions.contiguous()


def _run(
    prepared: PreparedDecoder, x: torch.Tensor, positions: torch.Tensor, slots: _Slots, mask: torch.Tensor
) -> torch.Tensor | None:
    """``x [rows, 1, hidden]`` -> the same after all layers and the final norm; None: this cannot answer the call."""
    y = torch.empty_like(x)
    prepared.tables(1)
    masked = mask.numel() > 0
    for _ in range(2):
        step = native_decoder.Step(
            x.shape[0],
            x.data_ptr(),
            y.data_ptr(),
            positions.data_ptr(),
            int(positions.shape[0] > 1),
            prepared.cos.data_ptr(),
            prepared.sin.data_ptr(),
            prepared.cos.shape[0],
            ctypes.addressof(slots.keys),
            ctypes.addressof(slots.values),
            slots.row_stride,
            slots.head_stride,
            slots.token_stride,
            slots.past,
            mask.data_ptr() if masked else None,
            mask.stride(0) if masked else 0,
            mask.element_size() if masked else 0,
            0,
            None if slots.lengths is None else ctypes.addressof(slots.lengths),
        )
        status = native_decoder.entry()(prepared.reference, ctypes.byref(step), torch.get_num_threads())
        if status != native_decoder.POSITION or int(positions.min()) < 0:
            break
        prepared.tables(int(positions.max()) + 1)
    if status in (native_decoder.POSITION, native_decoder.MASKED):
        return None
    native_library.check(status)
    return y
