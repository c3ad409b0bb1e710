"""Conversions that transformers' loader runs: a float weight is quantized, stored tensors become packed parameters.

transformers collects the exceptions of conversions into a report and raises a RuntimeError of its own. So a conversion
that fails notes its error on the quantizer, the remaining ones do nothing, and the typed error is raised after loading.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.quantizers_utils import get_module_from_name

from hf_quant.errors import HfQuantError
from hf_quant.integrations.experts import expert_weights
from hf_quant.nn.embedding import SharedHead
from hf_quant.nn.packed import PackedWeight

if TYPE_CHECKING:
    from hf_quant.integrations.stock import StockRuntime
    from hf_quant.integrations.transformers import HfQuantQuantizer


class _Shared(ConversionOps):
    """transformers copies a conversion for every module that it converts; its quantizer must stay the same one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class Quantize(_Shared):
    """One float weight -> the parameters of its QuantLinear; fused experts -> those of all their layers."""

    def __init__(self, hf_quantizer: HfQuantQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        assert model is not None
        self.hf_quantizer.stop_awaiting(kwargs.get("missing_keys"))
        result: dict[str, torch.Tensor] = {}
        values = ((key, value[0] if isinstance(value, list) else value) for key, value in input_dict.items())
        for name, layer, leaf, value in expert_weights(model, values):
            if isinstance(layer, SharedHead) and leaf == "weight":
                self.hf_quantizer.quantize_head(name, value)
                continue
            if not isinstance(layer, PackedWeight) or leaf != "weight":
                result[f"{name}.{leaf}"] = value.to(layer.get_parameter(leaf).dtype, copy=True).contiguous()
                continue
            if self.hf_quantizer.failure is None:
                try:
                    tensor = self.hf_quantizer.quantize(name, value)
                    result |= {f"{name}.{leaf}": p for leaf, p in layer.named_tensors(tensor).items()}
                    continue
                except HfQuantError as error:
                    self.hf_quantizer.note(error)
            result |= _placeholders(layer, name, value.device)
        return result


class Decode(_Shared):
    """The stored tensors of one module -> the parameters of its QuantLinear."""

    def __init__(self, hf_quantizer: StockRuntime) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        assert model is not None and full_layer_name is not None
        suffixes = self.hf_quantizer.patterns
        tensors = {suffixes[k]: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        layer, leaf = get_module_from_name(model, full_layer_name)
        if not isinstance(layer, PackedWeight):
            # a float weight whose name matches the format's own `weight`: cast as transformers would have done
            value = next(iter(tensors.values()))
            target = getattr(layer, leaf).dtype
            return {full_layer_name: value.to(target) if value.is_floating_point() else value}
        name = full_layer_name.removesuffix(f".{leaf}")
        if self.hf_quantizer.failure is None:
            try:
                tensor = self.hf_quantizer.format.decode(tensors, layer.scheme, name=name)
                return {f"{name}.{leaf}": parameter for leaf, parameter in layer.named_tensors(tensor).items()}
            except HfQuantError as error:
                self.hf_quantizer.note(error)
        return _placeholders(layer, name, next(iter(tensors.values())).device)


def _placeholders(layer: PackedWeight, name: str, device: torch.device) -> dict[str, torch.Tensor]:
    """Uninitialised parameters for a load that has failed already."""
    return {
        f"{name}.{leaf}": nn.Parameter(torch.empty_like(p, device=device), requires_grad=False)
        for leaf, p in layer.packed_parameters().items()
    }


def is_ours(conversion: object) -> bool:
    """Whether transformers' loader got this conversion from us."""
    operations = conversion.operations if isinstance(conversion, WeightConverter) else []
    return any(isinstance(operation, Decode) for operation in operations)
