"""NVIDIA ModelOpt's unified checkpoint (``hf_quant_config.json``), which TensorRT-LLM's PyTorch backend reads.

As ``modelopt.torch.export`` 0.47 writes it and ``tensorrt_llm/_torch/modules/linear.py`` loads it:

* int4 is ``W4A16_AWQ``: ``weight`` uint8 ``[out / 2, in]``, two rows per byte with the even row in the low nibble,
  values from -8 to 7 in two's complement; ``weight_scale`` ``[out, in / group]``; ``pre_quant_scale`` ``[in]``, which
  multiplies the inputs and is 1 here.
* int8 is ``W8A16``: ``weight`` int8 ``[out, in]`` and ``weight_scale`` ``[out]``.

Neither has zero points. TensorRT-LLM's kernels for int4 take groups of 64 and 128 columns. The files
were never run: that needs an NVIDIA GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers import PreTrainedModel

from hf_quant.checkpoint import read_headers
from hf_quant.errors import FormatError
from hf_quant.export import Written, float_config
from hf_quant.integrations.published import model_dtype
from hf_quant.nn.linear import QuantLinear
from hf_quant.nn.splitting import split_modules
from hf_quant.nn.swap import quantized_modules, shared_heads
from hf_quant.quantize.menu import FUSED
from hf_quant.tensor import QuantizedTensor

CONFIG_FILE = "hf_quant_config.json"
W4, W8, MIXED = "W4A16_AWQ", "W8A16", "MIXED_PRECISION"
GROUPS = (64, 128)
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}  # whose layout this is: readers ask for that name
_ANOTHER = (
    "choose another --to, or quantize the float model again: bits=4 in groups of 64 or 128, or bits=8 per channel."
)
_STAY = "keep the format that the checkpoint has, or choose another --to."
_HALVES = (torch.bfloat16, torch.float16)


def holds(tensor: QuantizedTensor) -> str | None:
    """Why the layout cannot hold a weight; None when it can."""
    scheme, (rows, columns) = tensor.scheme, tensor.shape
    if scheme.grid != "int":
        return f"it has no {scheme.grid} (its 4-bit floats are another grid, with 8-bit scales)"
    if not scheme.symmetric:
        return "its integer weights have no zero points"
    if tensor.order is not None:
        return "its columns are reordered (GPTQ's act-order)"
    group = scheme.group(columns)
    if scheme.bits == 8:
        return None if group == columns else f"8-bit weights have one scale per output, not groups of {group}"
    if group not in GROUPS:
        return f"TensorRT-LLM's 4-bit kernels take groups of 64 or 128 columns, not {group}"
    return f"two rows share a byte, and it has {rows}" if rows % 2 else None


def settings_of(tensor: QuantizedTensor) -> dict[str, Any]:
    """What the config says of a layer (one that :func:`holds` accepts)."""
    if tensor.scheme.bits == 8:
        return {"quant_algo": W8}
    group = tensor.scheme.group(tensor.shape[1])
    return {"quant_algo": W4, "group_size": group, "has_zero_point": False, "pre_quant_scale": True}


def encode(tensor: QuantizedTensor, dtype: torch.dtype, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of one layer, codes and scales with the values that they had.

    Args:
        tensor: ``[out, in]``.
        dtype: of the model; scales are stored in it where it is a half (the reader casts them to it).
        name: module name for errors.

    Raises:
        FormatError: the layout cannot hold it, or not its scales in that dtype.
    """
    label = name or "the weight"
    reason = holds(tensor)
    if reason is not None:
        raise FormatError(f"{label} cannot be converted to ModelOpt's layout: {reason}.", _ANOTHER)
    scale = tensor.scales()
    if dtype in _HALVES:
        if not torch.equal(scale.to(dtype).float(), scale.float()):
            kind = str(dtype).removeprefix("torch.")
            raise FormatError(
                f"{label} cannot be converted: its scales are no {kind} numbers, which the model computes in.",
                "quantize the float model again with scales of its dtype (scale_dtype).",
            )
        scale = scale.to(dtype)
    half = 1 << (tensor.scheme.bits - 1)
    signed = tensor.codes() ^ half  # code - half, in two's complement
    if tensor.scheme.bits == 8:
        return {"weight": signed.view(torch.int8).contiguous(), "weight_scale": scale[:, 0].contiguous()}
    packed = (signed[0::2] & 15) | ((signed[1::2] & 15) << 4)
    ones = torch.ones(tensor.shape[1], dtype=dtype)
    return {"weight": packed.contiguous(), "weight_scale": scale.contiguous(), "pre_quant_scale": ones}


def quant_config(layers: dict[str, dict[str, Any]], excluded: list[str]) -> dict[str, Any]:
    """``hf_quant_config.json``: one algorithm for all layers, or each layer's own."""
    schemes = list({json.dumps(found, sort_keys=True): found for found in layers.values()}.values())
    body: dict[str, Any] = {"quant_algo": MIXED, "kv_cache_quant_algo": None}
    body |= schemes[0] if len(schemes) == 1 else {"quantized_layers": layers}
    return {"producer": _PRODUCER, "quantization": body | {"exclude_modules": sorted(excluded)}}


def published_config(config: dict[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``: what ModelOpt makes of :func:`quant_config`."""
    body = config["quantization"]
    found: dict[str, Any] = {}
    if body["quant_algo"] == MIXED:
        groups: dict[str, dict[str, Any]] = {}
        for name, layer in body["quantized_layers"].items():
            groups.setdefault(json.dumps(layer, sort_keys=True), {"layer": layer, "targets": []})["targets"].append(
                name
            )
        found["config_groups"] = {
            f"group_{index}": {"weights": _weights(group["layer"]), "targets": sorted(group["targets"])}
            for index, group in enumerate(groups.values())
        }
        found["quantized_layers"] = body["quantized_layers"]
    found |= {"ignore": body["exclude_modules"], "quant_algo": body["quant_algo"]}
    return found | {"producer": config["producer"], "quant_method": "modelopt"}


def _weights(layer: dict[str, Any]) -> dict[str, Any]:
    if layer["quant_algo"] == W8:
        return {"dynamic": False, "num_bits": 8, "type": "int"}
    return {"dynamic": False, "num_bits": 4, "type": "int", "group_size": layer["group_size"]}


def write(
    model: PreTrainedModel, source: Path, directory: Path, stem: str, *, trust_remote_code: bool = False
) -> Written:
    """Write the safetensors, ``hf_quant_config.json`` and ``config.json``.

    Args:
        model: quantized by hf-quant.
        source: directory of the checkpoint; its tensors' names are compared.
        directory: where the files go; exists.
        stem: a name for the model (not used).
        trust_remote_code: nothing of the checkpoint's code is run here.

    Raises:
        FormatError: the layout cannot hold a layer, or layers that TensorRT-LLM fuses are stored in different ways.
    """
    layers = dict(quantized_modules(model))
    for name in split_modules(model):
        raise FormatError(f"{name} cannot be converted to ModelOpt's layout: experts are not written.", _STAY)
    for name, layer in layers.items():
        if not isinstance(layer, QuantLinear):
            raise FormatError(f"{name} cannot be converted: ModelOpt's layout has float embeddings.", _ANOTHER)
        if layer.transposed_source:
            raise FormatError(f"{name} cannot be converted: its weight is transposed (Conv1D).", _STAY)
    for name, _ in shared_heads(model):
        raise FormatError(f"{name} cannot be converted: ModelOpt's layout has float embeddings.", _ANOTHER)
    dtype = model_dtype(model)
    tensors = _float_tensors(model, source)
    settings: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        tensor = layer.quantized()
        tensors |= {f"{name}.{key}": value for key, value in encode(tensor, dtype, name).items()}
        settings[name] = settings_of(tensor)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    _check_fused(settings, linear)
    config = quant_config(settings, linear)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    save_torch_state_dict(tensors, directory, metadata={"format": "pt"})
    saved = float_config(model)
    saved.quantization_config = published_config(config)
    saved.save_pretrained(directory)
    notes = [f"{CONFIG_FILE} says {config['quantization']['quant_algo']}; read by TensorRT-LLM, and never run there"]
    if dtype not in _HALVES:
        notes.append("TensorRT-LLM computes in bfloat16 or float16: the float32 part will be rounded there")
    return Written(directory / CONFIG_FILE, tuple(notes))


def _float_tensors(model: PreTrainedModel, source: Path) -> dict[str, torch.Tensor]:
    """What is not quantized, under the names of the checkpoint; raises FormatError where those are others."""
    packed = {f"{name}.{key}" for name, layer in quantized_modules(model) for key in layer.packed_parameters()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    found = {key: value for key, value in model.state_dict().items() if key not in packed | tied}
    known = read_headers(source)
    for name in found:
        if name not in known:
            raise FormatError(
                f"{name} has another name in {source}: this model's checkpoints are not laid out like the model.", _STAY
            )
    return found


def _check_fused(settings: dict[str, dict[str, Any]], excluded: list[str]) -> None:
    for name, found in settings.items():
        parent, _, leaf = name.rpartition(".")
        for endings in FUSED:
            if leaf not in endings:
                continue
            for other in (f"{parent}.{ending}" for ending in endings if ending != leaf):
                if (other in settings or other in excluded) and settings.get(other) != found:
                    raise FormatError(
                        f"{name} and {other} are stored in different ways, and TensorRT-LLM makes one matrix of them.",
                        "quantize the float model again with one scheme for both.",
                    )
