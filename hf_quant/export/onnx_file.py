"""A quantized model as one ONNX file with its weights beside it, for onnxruntime; the codes are the checkpoint's."""

from __future__ import annotations

from pathlib import Path

import torch
from onnxscript import ir
from torch import nn
from transformers import PreTrainedModel

from hf_quant.export import Written, float_config, onnx_graph, onnx_layers
from hf_quant.kernels import registry
from hf_quant.version import __version__

FILE = "model.onnx"
WEIGHTS = "model.onnx_data"


def write(
    model: PreTrainedModel,
    source: Path,
    directory: Path,
    stem: str,
    *,
    trust_remote_code: bool = False,
    activations: str = registry.FLOAT,
) -> Written:
    """Write ``model.onnx``, ``model.onnx_data`` and the configs.

    Args:
        model: quantized by hf-quant, and used up: its layers become nodes. What is not quantized is written as float32.
        source: directory of the checkpoint (not read).
        directory: where the files go; exists.
        stem: a name for the model (not used: optimum looks for ``model.onnx``).
        trust_remote_code: nothing of the checkpoint's code is run here.
        activations: ``int8`` lets onnxruntime round the inputs of 4-bit layers to 8 bits.

    Raises:
        FormatError: the nodes of onnxruntime cannot hold a layer, or the model cannot be traced.
        DependencyError: a package of the extra ``onnx`` is missing.
    """
    onnx_layers.put_nodes(model, activations != registry.FLOAT)
    nn.Module.float(model).eval()  # transformers' own refuses models that were quantized
    program, task = onnx_graph.trace(model)
    program.producer_name, program.producer_version = "hf-quant", __version__
    ir.save(program, directory / FILE, external_data=WEIGHTS)
    config = float_config(model)
    config.dtype = torch.float32
    config.save_pretrained(directory)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    notes = [f"{FILE} does {task}; what is not quantized is float32"]
    if any(node.op_type == "DequantizeLinear" for node in program.graph):
        notes.append(
            "onnxruntime rounds the inputs of 8-bit layers to 8 bits, unless its session option "
            "session.qdq_matmulnbits_accuracy_level is 1 (exact, slow)"
        )
    return Written(directory / FILE, tuple(notes))
