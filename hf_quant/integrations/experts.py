"""Experts inside transformers' loader: a checkpoint's own experts are not merged, and fused ones are taken apart."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.base import HfQuantizer

from hf_quant.nn.experts import SplitExperts, split_fused
from hf_quant.nn.splitting import fuse_experts, merged_leaves, split_experts, split_modules

_MODEL_UNNAMED = "model" not in inspect.signature(HfQuantizer.update_weight_conversions).parameters


class ExpertsLoader(HfQuantizer):
    """A quantizer whose model may have had its experts taken apart before its weights are loaded."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.merges: list[WeightTransform] = []  # of transformers, not used while the experts are apart
        self._awaited: dict[str, SplitExperts] = {}
        self.has_split_experts = False
        self._model: nn.Module | None = None

    def preprocess_model(self, model: Any, **kwargs: Any) -> None:
        """Remember the model while its weights are loaded."""
        self._model = model
        super().preprocess_model(model, **kwargs)

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Forget it: a model holds its quantizer, and is copied and pickled with it."""
        self._model = None
        return super().postprocess_model(model, **kwargs)

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: Any = None
    ) -> list[WeightTransform]:
        """Without those that merge the experts of a checkpoint into one tensor, where experts were taken apart.

        Before release 5.21 transformers does not say for which model: it is the one that is being loaded.
        """
        model = self._model if model is None else model
        assert model is not None
        endings = [
            f".{name}.{leaf}" for name, module in split_modules(model).items() for leaf in module.layout.parameters
        ]
        kept = []
        for conversion in weight_conversions:
            merged = merged_leaves(conversion) if endings else None
            if merged is not None and any(ending.endswith(merged[0]) for ending in endings):
                self.merges.append(conversion)
            else:
                kept.append(conversion)
        names = () if _MODEL_UNNAMED else (model,)
        found: list[WeightTransform] = super().update_weight_conversions(kept, *names)
        return found

    def _convert_model_for_quantization(self, model: Any) -> None:
        """Take experts apart to see whether a checkpoint has them quantized; free of cost on the meta device.

        transformers would replace a few kinds of experts by modules of its own here.
        """
        split_experts(model)

    def keep_split(self, model: nn.Module, quantized: Collection[str]) -> None:
        """After that: put them together again unless one of these names is that of a layer within experts."""
        names = split_modules(model)
        if not any(layer.startswith(f"{name}.") for name in names for layer in quantized):
            fuse_experts(model)

    def leave_to_stock(self, model: Any) -> None:
        """After that: as transformers' own quantizers want the model."""
        fuse_experts(model)
        super()._convert_model_for_quantization(model)

    def await_fused(self, model: nn.Module) -> None:
        """Let split experts also take the fused tensors of a checkpoint: they get parameters of those names for now."""
        self._awaited = split_modules(model)
        for module in self._awaited.values():
            dtype = next(module.parameters()).dtype
            for name in module.layout.parameters:
                # empty: it has no values, and a device map should not count it
                module.register_parameter(name, nn.Parameter(torch.empty(0, device="meta", dtype=dtype)))

    def stop_awaiting(self, missing: set[str] | None) -> None:
        """Every tensor of the checkpoint has its place: those parameters go."""
        for name, module in self._awaited.items():
            for leaf in module.layout.parameters:
                del module._parameters[leaf]
                if missing is not None:
                    missing.discard(f"{name}.{leaf}")
        self._awaited = {}

    def settle(self, model: nn.Module) -> None:
        """All layers are quantized that will be: what is left of the fused experts goes."""
        found = split_modules(model)
        self.has_split_experts = bool(found)
        for module in found.values():
            module.own()

    def put_together(self, model: Any) -> None:
        """Fuse the experts of a float model again, and save them as transformers does."""
        if not split_modules(model):
            return
        fuse_experts(model)
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = [*conversions, *self.merges]


def expert_weights(
    model: nn.Module, values: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Full name of a layer, the layer, ``weight`` or ``bias``, and the tensor, of fused tensors and of plain ones.

    Args:
        model: whose experts may have been taken apart.
        values: full parameter name -> tensor.
    """
    for key, value in values:
        name, _, leaf = key.rpartition(".")
        module = model.get_submodule(name)
        if not isinstance(module, SplitExperts):
            yield name, module, leaf, value
            continue
        for below, piece in split_fused({leaf: value}, module.layout, module.leaves).items():
            inside, _, kind = below.rpartition(".")
            yield f"{name}.{inside}", module.get_submodule(inside), kind, piece
