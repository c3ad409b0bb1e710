"""A model whose quantized layers are nodes, traced into one ONNX graph with the names that optimum gives to its inputs.

transformers' own exporter traces and repairs the graph (``transformers.exporters``, which calls ``torch.onnx.export``);
what is decided here is what goes in and out: a causal language model takes its cache as ``past_key_values.N.key`` and
``.value`` and returns it longer as ``present.N.key`` and ``.value``, so one graph reads a prompt and goes on from it.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from dataclasses import dataclass
from typing import Any

import torch
from onnxscript import ir
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.exporters import OnnxConfig, OnnxExporter

from hf_quant.cache_name import CACHE, cache_of
from hf_quant.errors import FormatError
from hf_quant.export.onnx_layers import MICROSOFT, OPSET
from hf_quant.export.tracing import quiet

_STAY = "keep the format that the checkpoint has, or choose another --to."
_ROWS, _PAST, _NEWS = 2, 3, 5  # sizes of the inputs that are traced: all different, none 1
_LEAF = re.compile(rf"(?:input\.|output\.)?{CACHE}\.layers\.(\d+)\.(key|value)s")
_BATCH, _SEQUENCE, _EARLIER = "batch_size", "sequence_length", "past_sequence_length"
_NOISY = ("torch.onnx", "transformers", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class Inputs:
    """What a graph is traced with.

    Attributes:
        task: optimum's name of what it does.
        values: the arguments of ``forward``.
        dynamic: of each argument, the axes that may have other sizes, as torch.export takes them.
    """

    task: str
    values: dict[str, Any]
    dynamic: dict[str, Any]


def trace(model: PreTrainedModel) -> tuple[ir.Model, str]:
    """The graph of a float32 model in evaluation mode, and what it does in optimum's words.

    Raises:
        FormatError: of a kind that is not exported (encoder-decoder, several modalities, a cache of another kind), or
            torch.export or torch.onnx cannot trace it.
    """
    inputs = inputs_of(model)
    config = OnnxConfig(dynamic=True, dynamic_shapes=inputs.dynamic, opset_version=OPSET)
    # the exporter reports its steps on the standard output, which is not ours to fill
    with contextlib.redirect_stdout(io.StringIO()), quiet(*_NOISY):
        try:
            program, _ = OnnxExporter().export_program(model, dict(inputs.values), config)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, AssertionError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FormatError(f"{_kind(model)} cannot be traced into a graph: {said}", _STAY) from error
    program.opset_imports[MICROSOFT] = 1
    _rename(program.graph, inputs)
    return program, inputs.task


def inputs_of(model: PreTrainedModel) -> Inputs:
    """Small arguments to trace a model with; raises FormatError for a kind that is not exported."""
    config: Any = model.config
    arguments = inspect.signature(model.forward).parameters
    if config.is_encoder_decoder:
        raise FormatError(f"{_kind(model)} cannot be exported: it has an encoder and a decoder.", _STAY)
    if model.main_input_name == "pixel_values" and "input_ids" not in arguments:
        return _images(model)
    if model.main_input_name != "input_ids" or "pixel_values" in arguments or "input_features" in arguments:
        raise FormatError(f"{_kind(model)} cannot be exported: only texts or only images are.", _STAY)
    if model.can_generate():
        return _decoder(model, arguments)
    values = {"input_ids": _ids(config, _NEWS), "attention_mask": torch.ones(_ROWS, _NEWS, dtype=torch.int64)}
    if "token_type_ids" in arguments:
        values["token_type_ids"] = torch.zeros(_ROWS, _NEWS, dtype=torch.int64)
    task = _TASKS.get(type(model).__name__.rpartition("For")[2], "feature-extraction")
    return Inputs(task, values, {name: {0: _any(), 1: _any()} for name in values})


_TASKS = {
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "ImageClassification": "image-classification",
}


def _any() -> Any:
    # raises where tracing would fix the size, instead of fixing it
    return torch.export.Dim.DYNAMIC


def _kind(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} ({model.config.model_type})"


def _ids(config: Any, columns: int) -> torch.Tensor:
    rows = config.get_text_config().vocab_size
    return torch.arange(_ROWS * columns).view(_ROWS, columns) % rows


def _images(model: PreTrainedModel) -> Inputs:
    config: Any = model.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    values = {"pixel_values": torch.zeros(_ROWS, config.num_channels, height, width)}
    task = _TASKS.get(type(model).__name__.rpartition("For")[2], "feature-extraction")
    return Inputs(task, values, {"pixel_values": {0: _any()}})


def _decoder(model: PreTrainedModel, arguments: Any) -> Inputs:
    with torch.no_grad():
        output = model(_ids(model.config, _PAST), use_cache=True)
    cache = cache_of(output)

    def shape(states: torch.Tensor) -> tuple[int, ...]:
        return (*states.shape[:2], _PAST, states.shape[3])

    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    if not isinstance(cache, DynamicCache) or any(type(layer) not in plain for layer in cache.layers):
        raise FormatError(f"{_kind(model)} cannot be exported: its cache is not one of keys and values.", _STAY)
    past = DynamicCache()  # windows are cut by the mask of the graph, so that every layer keeps all that it is given
    for index, layer in enumerate(cache.layers):
        past.update(layer.keys.new_zeros(shape(layer.keys)), layer.values.new_zeros(shape(layer.values)), index)
    mask = torch.ones(_ROWS, _PAST + _NEWS, dtype=torch.int64)
    mask[0, 0] = 0  # padding on the left
    values: dict[str, Any] = {"input_ids": _ids(model.config, _NEWS), "attention_mask": mask}
    dynamic: dict[str, Any] = {name: {0: _any(), 1: _any()} for name in values}
    if "position_ids" in arguments:
        values["position_ids"] = torch.arange(_PAST, _PAST + _NEWS).expand(_ROWS, _NEWS).contiguous()
        dynamic["position_ids"] = {0: _any(), 1: _any()}
    values[CACHE] = past
    dynamic[CACHE] = [{0: _any(), 2: _any()} for _ in range(2 * len(past.layers))]
    return Inputs("text-generation-with-past", values, dynamic)


def _rename(graph: ir.Graph, inputs: Inputs) -> None:
    """optimum's names for inputs and outputs, and names that say something for axes of any size."""
    axes: dict[str, str] = {}
    for value in graph.inputs:
        found = _LEAF.fullmatch(value.name or "")
        if found is not None:
            value.name = f"past_key_values.{found[1]}.{found[2]}"
            names = {0: _BATCH, 2: _EARLIER}
        else:
            names = {0: _BATCH} if value.name == "pixel_values" else {0: _BATCH, 1: _SEQUENCE}
            if value.name == "attention_mask" and CACHE in inputs.values:
                names[1] = f"{_EARLIER} + {_SEQUENCE}"
        assert value.shape is not None
        for axis, name in names.items():
            axes.setdefault(str(value.shape[axis].value), name)
    for value in graph.outputs:
        found = _LEAF.fullmatch(value.name or "")
        if found is not None:
            value.name = f"present.{found[1]}.{found[2]}"
    symbols = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in sorted(axes, key=len, reverse=True)))
    for value in (*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(
                dim if isinstance(dim, int) else symbols.sub(lambda match: axes[match[0]], str(dim.value))
                for dim in value.shape
            )
