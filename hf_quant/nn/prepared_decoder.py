"""A decoder described for the native library, with a cheap test of whether the description still holds."""

from __future__ import annotations

import ctypes
import operator
from itertools import repeat
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from hf_quant.kernels import native_decoder
from hf_quant.kernels.native import NativePrepared
from hf_quant.kernels.native_library import DTYPES
from hf_quant.nn.decoder import LayerParts, Parts
from hf_quant.nn.linear import Layouts

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_READY = operator.attrgetter("_ready")
_FIRST_POSITIONS = 1024


class Watch:
    """Notices when a decoder is no longer what it was: modules, hooks, forwards, layouts, addresses of parameters.

    It compares lists in C where it can, which takes 30 microseconds for 30 layers when they are in the CPU's caches.
    They are not after all weights have gone through, so between two tokens of one sequence :func:`noted` stands in.
    """

    def __init__(self, decoder: nn.Module, parts: Parts | None) -> None:
        inner = [m for name, child in decoder.named_children() if name != "embed_tokens" for m in child.modules()]
        self._children = [decoder._modules, *(m._modules for m in inner if m._modules)]
        self._expected = [dict(children) for children in self._children]
        self._dicts = [m.__dict__ for m in inner]
        self._hooks = [hooks for m in inner for name in _HOOKS if (hooks := getattr(m, name)) is not None]
        # a decoder that cannot run fused may be able to once any layout changes
        self._changes = Layouts.changes if parts is None else None
        layers = () if parts is None else parts.layers
        self._linears = [linear for layer in layers for linear in layer.linears]
        self._ready = list(map(_READY, self._linears))
        self._vectors = [] if parts is None else _vectors(parts)
        self._addresses = [vector.data_ptr() for vector in self._vectors]

    def unheard(self) -> bool:
        """Whether nobody listens to the modules or has given one another forward."""
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return False
        if any(map(dict.__contains__, self._dicts, repeat("forward"))):
            return False
        return not any(self._hooks) or _idle(self._hooks)

    def same(self) -> bool:
        """Whether modules, layouts and addresses are those that were described."""
        return (
            self._changes in (None, Layouts.changes)
            and self._children == self._expected
            and all(map(operator.is_, map(_READY, self._linears), self._ready))
            and [vector.data_ptr() for vector in self._vectors] == self._addresses
        )


def noted() -> tuple[int, int]:
    """Counters that go up with every hook that anybody registers and every layout that any layer changes."""
    return RemovableHandle.next_id, Layouts.changes


def _vectors(parts: Parts) -> list[torch.Tensor]:
    """Norms and biases: what the description holds addresses of, besides the weights."""
    found: list[torch.Tensor] = [parts.final.weight]
    for layer in parts.layers:
        found += [norm.weight for norm in layer.norms]
        found += [linear.bias for linear in layer.linears if linear.bias is not None]
    return found


def _idle(hooks: list[Any]) -> bool:
    """Whether all hooks are those that transformers leaves behind to collect outputs, and it is not collecting."""
    from transformers.utils import output_capturing

    home = output_capturing.__name__
    if any(hook.__module__ != home for each in hooks for hook in each.values()):
        return False
    return output_capturing._active_collector.get() is None


class PreparedDecoder:
    """``hfq_decoder`` of a decoder, and its rotary tables.

    Attributes:
        parts: what was described.
        code: the library's name for the dtype.
        structure: to be passed by reference.
    """

    def __init__(self, decoder: Any, parts: Parts) -> None:
        self.parts = parts
        self.code = DTYPES[parts.dtype]
        self.count = len(parts.layers)
        self._layers = (native_decoder.Layer * self.count)(*(_describe(layer) for layer in parts.layers))
        # what the structures point into stays alive with them, whatever happens to the modules
        vectors = [vector.detach() for vector in _vectors(parts)]
        self._keep = [linear._ready for layer in parts.layers for linear in layer.linears], vectors
        self.structure = native_decoder.Decoder(
            self.code, self.count, *parts.sizes, self._layers, parts.final.weight.data_ptr(), _epsilon(parts.final), 0
        )
        self.reference = ctypes.byref(self.structure)
        self._rotary = decoder.rotary_emb
        self._rotated: tuple[Any, ...] = ()
        self.cos = self.sin = torch.empty(0)

    def tables(self, positions: int) -> None:
        """Make sure that ``cos`` and ``sin`` ``[at least positions, head_dim]`` are those of the rotary module now."""
        frequencies = self._rotary.inv_freq
        state = (frequencies.data_ptr(), self._rotary.attention_scaling)
        if state == self._rotated and self.cos.shape[0] >= positions:
            return
        size = max(_FIRST_POSITIONS, self.cos.shape[0])
        while size < positions:
            size *= 2
        with torch.inference_mode(False), torch.no_grad():
            like = torch.empty(0, dtype=self.parts.dtype)
            cos, sin = self._rotary(like, position_ids=torch.arange(size).unsqueeze(0))
            self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()
        self._rotated = state


def _describe(layer: LayerParts) -> native_decoder.Layer:
    projections = []
    for linear in layer.linears:
        assert linear._ready is not None and isinstance(linear._ready.prepared, NativePrepared)
        bias = None if linear.bias is None else linear.bias.data_ptr()
        projections.append(native_decoder.projection(linear._ready.prepared, bias))
    absent = 4 - len(layer.norms)
    norms = [*(norm.weight.data_ptr() for norm in layer.norms), *[None] * absent]
    epsilons = [*(_epsilon(norm) for norm in layer.norms), *[0.0] * absent]
    return native_decoder.Layer(*projections, *norms, *epsilons, layer.scaling, int(layer.rotary))


def _epsilon(norm: Any) -> float:
    value = norm.variance_epsilon
    assert isinstance(value, float)
    return value
