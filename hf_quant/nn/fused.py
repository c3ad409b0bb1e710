"""One native call instead of thousands of torch ops: the forward of a Llama-like decoder.

:func:`fuse` gives the decoder of a model (``LlamaModel`` and the like) another ``forward``. It runs the native code
when a call is one that this can answer exactly (no gradients, causal, a plain cache or none, nobody listening), and the
model's own forward for every other call. Nothing else of the model changes, and :func:`unfuse` takes it back.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from hf_quant.cache_name import CACHE
from hf_quant.kernels import native_decoder, native_library
from hf_quant.nn.decoder import ATTENTIONS, Parts, Refusal, decoders, take_apart
from hf_quant.nn.forwards import StandIn
from hf_quant.nn.fused_inputs import mask_of, positions_of
from hf_quant.nn.head import HeadForward, head_of
from hf_quant.nn.prepared_decoder import PreparedDecoder, Watch, noted
from hf_quant.nn.slots import Slots, slots_of
from hf_quant.nn.switching import enabled, switch

__all__ = ["FusedForward", "FusedReport", "describe_fused", "enabled", "fuse", "switch", "unfuse"]

MAX_ROWS = 64
CHUNK = 512  # tokens (times rows) of one native call; more would only take more memory
_QUIET = frozenset(("use_cache", "return_dict", "output_attentions", "output_hidden_states"))
# What generate is given for itself and hands on to every forward; transformers' server always gives the tokenizer.
_UNREAD = frozenset(("tokenizer", "assistant_tokenizer"))


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
        inputs_embeds: torch.Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast | None:
        """The output of a call that the native code can answer, None for every other; nothing is touched then."""
        cache = others.pop(CACHE, None)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if type(tokens) is not torch.Tensor or tokens.dim() < 2 or (input_ids is None) == (inputs_embeds is None):
            return None
        rows, news = tokens.shape[:2]
        if not 0 < rows <= MAX_ROWS or news < 1 or (news > 1 and rows * news > native_decoder.most_tokens()):
            return None
        decoder = self.module()
        if decoder is None or not _calm(decoder, others) or self.before is not None:
            return None
        cached = others.get("use_cache")
        cached = decoder.config.use_cache if cached is None else cached
        if cache is None and cached:
            cache = DynamicCache(config=decoder.config)
        elif cache is not None and not cached:
            return None
        prepared = self._prepared
        if prepared is None or not self._goes_on(cache):
            prepared = self._current(decoder)
        if prepared is None:
            return None
        slots = slots_of(cache, prepared, rows, news)
        if slots is None:
            return None
        mask = mask_of(attention_mask, rows, news, slots)
        positions = positions_of(position_ids, rows, news, slots.past, masked=attention_mask is not None)
        if mask is None or positions is None:
            return None
        x = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if type(x) is not torch.Tensor or x.dtype != prepared.parts.dtype or x.device.type != "cpu":
            return None
        if x.shape != (rows, news, prepared.parts.sizes[0]):
            return None
        y = _run(prepared, x.contiguous(), positions, slots, mask)
        if y is None:
            return None
        slots.advance(news)
        # the first token after a prompt looks at the whole model once more: callers replace forwards between the two
        if cache is not None and news == 1:
            self._last = (weakref.ref(cache), slots.past + 1, noted())
        return BaseModelOutputWithPast(last_hidden_state=y, **{CACHE: cache})

    def _goes_on(self, cache: Any) -> bool:
        """Whether this is the token after the last one, and no hook was registered and no layout changed since."""
        last = self._last
        if not last or cache is None or last[0]() is not cache:
            return False
        return bool(last[1] == cache.get_seq_length() and last[2] == noted())

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
            if value is not None and name not in _UNREAD:
                return False
        elif name != "use_cache" and value is not None and bool(value) != (name == "return_dict"):
            return False
    config = decoder.config
    if (
        config._attn_implementation not in ATTENTIONS
        or not config.return_dict
        or not getattr(config, "is_causal", True)
    ):
        return False
    return not (config.output_attentions or config.output_hidden_states)


def _run(
    prepared: PreparedDecoder, x: torch.Tensor, positions: torch.Tensor, slots: Slots, mask: torch.Tensor
) -> torch.Tensor | None:
    """``x [rows, news, hidden]`` -> the same after all layers and the final norm; None: this cannot answer the call."""
    rows, news, _ = x.shape
    prepared.tables(1)
    if news > 1:
        lowest, highest = positions.aminmax()
        if int(lowest) < 0:
            return None
        prepared.tables(int(highest) + 1)
    if rows * news <= CHUNK or news == 1:
        return _call(prepared, x, positions, slots, mask, 0)
    step = max(1, CHUNK // rows)
    found = []
    for begin in range(0, news, step):
        part = slice(begin, begin + step)
        y = _call(prepared, x[:, part].contiguous(), positions[:, part].contiguous(), slots, mask, begin)
        assert y is not None  # positions were looked at above, and no row is masked as a whole
        found.append(y)
    return torch.cat(found, dim=1)


def _call(
    prepared: PreparedDecoder, x: torch.Tensor, positions: torch.Tensor, slots: Slots, mask: torch.Tensor, begin: int
) -> torch.Tensor | None:
    """One native call for tokens that come ``begin`` tokens after the first new one."""
    y = torch.empty_like(x)
    masked = mask.numel() > 0
    for _ in range(2):
        step = native_decoder.Step(
            x.shape[0],
            x.shape[1],
            x.data_ptr(),
            y.data_ptr(),
            positions.data_ptr(),
            positions.shape[1] if positions.shape[0] > 1 else 0,
            prepared.cos.data_ptr(),
            prepared.sin.data_ptr(),
            prepared.cos.shape[0],
            ctypes.addressof(slots.keys),
            ctypes.addressof(slots.values),
            slots.row_stride,
            slots.head_stride,
            slots.token_stride,
            slots.past + begin,
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
