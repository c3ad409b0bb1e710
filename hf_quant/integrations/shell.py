"""A float model without the weights that are to be quantized: those are read from its files one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_quant.checkpoint import TensorInfo, read_headers
from hf_quant.integrations.experts import ExpertsLoader
from hf_quant.nn.splitting import split_experts
from hf_quant.plan import Plan, PlannedLayer

METHOD = "hf_quant_shell"


class Absent(nn.Module):
    """Stands where a linear layer was: its bias and its sizes, but no weight."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        bias = layer.bias if isinstance(layer.bias, torch.Tensor) else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(torch.empty_like(bias)))
        # no parameter: for models that ask a layer for the dtype of its weight, or initialize it
        self.weight = torch.empty(layer.weight.shape, device="meta")
        setattr(self.weight, "_is_hf_initialized", True)  # noqa: B010 - no attribute that the type checker knows
        for size in ("in_features", "out_features"):
            if hasattr(layer, size):
                setattr(self, size, getattr(layer, size))


class FileWeights:
    """Float weights read from safetensors when they are asked for."""

    def __init__(self, directory: Path, where: dict[str, TensorInfo]) -> None:
        self.directory, self.where = directory, where

    def weight(self, layer: PlannedLayer) -> torch.Tensor:
        info = self.where[layer.name]
        with safe_open(self.directory / info.file, "pt") as stored:
            found: torch.Tensor = stored.get_tensor(info.name)
        return oriented(found, layer)


class ModelWeights:
    """Float weights of a model in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def weight(self, layer: PlannedLayer) -> torch.Tensor:
        return oriented(self.model.get_parameter(f"{layer.name}.weight").detach(), layer)


def oriented(weight: torch.Tensor, layer: PlannedLayer) -> torch.Tensor:
    """float32 ``[out, in]``, whatever the layer's class stores; never the stored tensor itself."""
    return (weight.t() if layer.kind == "Conv1D" else weight).to(torch.float32, copy=True).contiguous()


class _ShellConfig(QuantizationConfigMixin):
    def __init__(self, absent: frozenset[str]) -> None:
        self.quant_method = METHOD
        self.absent = absent


class _ShellQuantizer(ExpertsLoader):
    requires_calibration = False
    quantization_config: _ShellConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        split_experts(model, self.quantization_config.absent)
        for name in self.quantization_config.absent:
            model.set_submodule(name, Absent(model.get_submodule(name)))
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {r"\.weight$"}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def open_shell(
    directory: Path, kind: type[PreTrainedModel], plan: Plan, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, FileWeights | ModelWeights]:
    """The model in float32 without its planned weights, and where those are.

    A checkpoint whose tensors have other names than the model's parameters (an old layout that transformers converts
    when it loads it) is loaded as a whole instead.

    Args:
        directory: a float checkpoint, validated.
        kind: the model's class (or an Auto class).
        plan: made for that class.
        trust_remote_code: run model code that comes with the checkpoint.
    """
    extra: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    where = _locate(getattr(kind, "base_model_prefix", ""), plan, read_headers(directory))
    if where is None:
        model = kind.from_pretrained(directory, dtype=torch.float32, **extra).eval()
        split_experts(model, [layer.name for layer in plan.quantized])
        return model, ModelWeights(model)
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(_ShellConfig)
        auto.register_quantizer(METHOD)(_ShellQuantizer)
    shell = _ShellConfig(frozenset(where))
    model = kind.from_pretrained(directory, dtype=torch.float32, quantization_config=shell, **extra).eval()
    return model, FileWeights(directory, where)


def _locate(prefix: str, plan: Plan, headers: dict[str, TensorInfo]) -> dict[str, TensorInfo] | None:
    """Layer -> its tensor in the files; None when one of them has another name or shape there."""
    found = {}
    for layer in plan.quantized:
        shape = layer.shape[::-1] if layer.kind == "Conv1D" else layer.shape
        key = f"{layer.name}.weight"
        names = (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}."))
        info = next((headers[name] for name in names if name in headers), None)
        if info is None or tuple(info.shape) != tuple(shape):
            return None
        found[layer.name] = info
    return found
