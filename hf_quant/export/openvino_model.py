"""A quantized causal model as an OpenVINO graph with its cache inside; every quantized layer is a compressed constant.

transformers' own exporter traces the model and makes the cache a state of the graph. While it traces, each quantized
layer is one operator that has no weight; OpenVINO's frontend then asks us what that operator is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from openvino.frontend.pytorch import ConversionExtension
from transformers import DynamicCache, PreTrainedModel
from transformers.exporters import exporter_openvino
from transformers.exporters.base import ExportedModel
from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter
from transformers.exporters.utils import get_leaf_tensors

from hf_quant.cache_name import CACHE
from hf_quant.errors import DependencyError, FormatError
from hf_quant.export import openvino_weights
from hf_quant.nn.embedding import QuantEmbedding, SharedHead
from hf_quant.nn.experts import SplitExperts
from hf_quant.nn.forwards import bias_of, replaced_forwards
from hf_quant.nn.packed import PackedWeight
from hf_quant.nn.swap import quantized_modules, shared_heads

_STAY = "keep the format that the checkpoint has, or choose another --to."
_BATCH, _PAST, _NEW = 2, 4, 3  # of the traced call: none is 0 or 1, which a trace would take for constants
_LIBRARY = "hf_quant_openvino"


# index: which layer, in the order of the model
@torch.library.custom_op(f"{_LIBRARY}::linear", mutates_args=())
def _linear(x: torch.Tensor, index: int, rows: int) -> torch.Tensor:
    raise NotImplementedError("it stands for a layer while a model is traced")


@_linear.register_fake
def _linear_shape(x: torch.Tensor, index: int, rows: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op(f"{_LIBRARY}::lookup", mutates_args=())
def _lookup(ids: torch.Tensor, index: int, columns: int) -> torch.Tensor:
    raise NotImplementedError("it stands for an embedding while a model is traced")


@_lookup.register_fake
def _lookup_shape(ids: torch.Tensor, index: int, columns: int) -> torch.Tensor:
    return ids.new_empty((*ids.shape, columns), dtype=torch.float32)


def check(model: PreTrainedModel) -> None:
    """Raises FormatError for a model or a layer that cannot be written, naming it."""
    name = type(model).__name__
    if not name.endswith(("ForCausalLM", "LMHeadModel")) or model.config.is_encoder_decoder:
        raise FormatError(
            f"{name} ({model.config.model_type}) cannot be written for OpenVINO: it has to be a causal language model.",
            _STAY,
        )
    for found, module in model.named_modules():
        if isinstance(module, SplitExperts):
            raise FormatError(
                f"{found} cannot be written for OpenVINO: which experts run depends on the tokens.",
                _STAY,
            )
    for found, layer in quantized_modules(model):
        openvino_weights.check(layer.scheme, found)


def sample(model: PreTrainedModel) -> dict[str, Any]:
    """The inputs of the traced call: new tokens after a few others, which are in the cache."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(_BATCH * (_PAST + _NEW)).mul(7919).remainder(rows).view(_BATCH, -1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :_PAST], use_cache=True, **{CACHE: cache})
    found = {"input_ids": ids[:, _PAST:], "attention_mask": torch.ones_like(ids)}
    if takes_positions(model):
        found["position_ids"] = torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, -1).contiguous()
    return {**found, CACHE: cache, "use_cache": True}


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether ``position_ids`` is an input."""
    return "position_ids" in inspect.signature(model.forward).parameters


def trace(model: PreTrainedModel) -> ExportedModel:
    """The graph of a model that :func:`check` accepts, with inputs ``input_ids``, ``attention_mask``, ``position_ids``
    (where the model has them) and ``beam_idx``, the output ``logits`` and the cache as its state.

    Raises:
        FormatError: transformers' exporter or OpenVINO's frontend cannot hold the model.
        DependencyError: transformers keeps the extensions of its exporter elsewhere.
    """
    layers = dict(quantized_modules(model))
    inputs = sample(model)
    with _standing_in(model, layers), _frontend_knows(layers):
        try:
            config = OpenVINOConfig(dynamic=True, dynamic_shapes=_shapes(inputs))
            found = OpenVINOExporter().export(model, inputs, config)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            what = str(error).strip().splitlines() or [type(error).__name__]
            raise FormatError(
                f"{model.config.model_type} cannot be traced by transformers' exporter for OpenVINO: {what[0]}", _STAY
            ) from error
    program = found.program
    if not program.get_sinks():
        raise FormatError(f"the cache of {model.config.model_type} is not one that OpenVINO can keep.", _STAY)
    _repeat_heads_as_plugins_expect(program)
    return found


def _shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    """Which sizes vary: rows and tokens; of a cache's other tensors than keys and values, all that may."""
    varies = torch.export.Dim.AUTO
    tokens = {name: {0: varies, 1: varies} for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    leaves = get_leaf_tensors(inputs[CACHE]).values()
    # keys and values are [rows, heads, tokens, columns]
    state = [{0: varies, 2: varies} if leaf.dim() == 4 else dict.fromkeys(range(leaf.dim()), varies) for leaf in leaves]
    return {**tokens, CACHE: state}


@contextmanager
def _standing_in(model: PreTrainedModel, layers: dict[str, PackedWeight]) -> Iterator[None]:
    """Inside, quantized layers are the operators of this file."""
    index = {id(layer): position for position, layer in enumerate(layers.values())}
    pairs: list[tuple[torch.nn.Module, Callable[..., torch.Tensor]]] = []
    for layer in layers.values():
        at = index[id(layer)]
        pairs.append((layer, _looking_up(layer, at) if isinstance(layer, QuantEmbedding) else _multiplying(layer, at)))
    pairs += [(head, _multiplying(head, index[id(head.table)])) for _, head in shared_heads(model)]
    with replaced_forwards(pairs):
        yield


def _multiplying(layer: Any, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    order = None if isinstance(layer, SharedHead) else layer.quantized().order

    def forward(x: torch.Tensor) -> torch.Tensor:
        if order is not None:
            x = x.index_select(-1, order)
        found = _linear(x, index, layer.out_features)
        bias = bias_of(layer)
        return found if bias is None else found + bias

    return forward


def _looking_up(layer: QuantEmbedding, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    dtype = layer.compute.dtype  # the exporter changes it for a while

    def forward(ids: torch.Tensor) -> torch.Tensor:
        found = _lookup(ids, index, layer.in_features)
        if layer.constant is None:
            return found
        factor, rounded = layer.constant
        return found * (float(torch.tensor(factor, dtype=dtype)) if rounded else factor)

    return forward


@contextmanager
def _frontend_knows(layers: dict[str, PackedWeight]) -> Iterator[None]:
    """Inside, OpenVINO's frontend asks us for the nodes of the operators of this file."""
    weights: dict[int, ov.Output] = {}
    named = list(layers.items())

    def weight(context: Any) -> ov.Output:
        # one set of nodes for an embedding and the head that shares it
        index = int(context.get_values_from_const_input(1))
        if index not in weights:
            name, layer = named[index]
            weights[index] = openvino_weights.decompressed(layer.quantized(), name)
        return weights[index]

    def linear(context: Any) -> list[ov.Output]:
        return [ops.matmul(context.get_input(0), weight(context), False, True).output(0)]

    def lookup(context: Any) -> list[ov.Output]:
        return [ops.gather(weight(context), context.get_input(0), ops.constant(0)).output(0)]

    known = getattr(exporter_openvino, "_OV_CONVERSION_EXTENSIONS", None)
    if not isinstance(known, list):
        raise DependencyError(
            "this release of transformers exports to OpenVINO in a way that hf-quant does not know.",
            "install the release that hf-quant was tested with: pip install transformers==5.23.*",
        )
    ours = [
        ConversionExtension(f"{_LIBRARY}.linear.default", linear),
        ConversionExtension(f"{_LIBRARY}.lookup.default", lookup),
    ]
    known.extend(ours)
    try:
        yield
    finally:
        del known[-len(ours) :]


def _repeat_heads_as_plugins_expect(program: ov.Model) -> None:
    """Keys and values that several heads share are repeated by a bidirectional Broadcast of a constant shape.

    The exporter writes a numpy Broadcast to a computed shape there, in front of which the CPU plugin of 2026.4 no
    longer recognizes the cache and takes every attention apart.
    """
    for attention in program.get_ordered_ops():
        if attention.get_type_name() != "ScaledDotProductAttention":
            continue
        for place in (1, 2):
            chain = _chain(attention.input_value(place).get_node(), ("Reshape", "Broadcast", "Unsqueeze"))
            if chain is None:
                continue
            reshape, broadcast, single = chain
            heads, shared = reshape.get_output_partial_shape(0)[1], single.get_output_partial_shape(0)[1]
            if heads.is_static and shared.is_static:
                times = heads.get_length() // shared.get_length()
                shape = ops.constant(np.array([1, 1, times, 1, 1], dtype=np.int64))
                broadcast.output(0).replace(ops.broadcast(single, shape, broadcast_spec="BIDIRECTIONAL").output(0))
    program.validate_nodes_and_infer_types()


def _chain(node: ov.Node, kinds: tuple[str, ...]) -> list[ov.Node] | None:
    """A node and what its first input comes from, and so on, when they are of these kinds."""
    found = [node]
    while len(found) < len(kinds) and found[-1].get_input_size():
        found.append(found[-1].input_value(0).get_node())
    return found if tuple(each.get_type_name() for each in found) == kinds else None
