"""What others make of a plan's layers: stock transformers of packed ones (found by trying), files of their names."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Any, cast

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

DEQUANTIZE, NOTHING = "dequantize", "nothing"


def stock_packed(model: nn.Module, quantized: Collection[str]) -> str:
    """How stock transformers loads a model with these layers packed by compressed-tensors.

    Returns:
        ``""`` with no argument; ``dequantize`` only with ``CompressedTensorsConfig(dequantize=True)``, because the
        model's code reads weights that are not there while they are packed; ``nothing`` when its loader fails anyway.
    """
    if not hasattr(model, "_init_weights"):
        return ""  # not a model of transformers
    for conversion in get_model_conversion_mapping(cast(Any, model), add_legacy=False):
        if isinstance(conversion, WeightConverter) and _splits(conversion):
            return NOTHING
    layers = [model.get_submodule(name) for name in quantized if _has(model, name)]
    if any(isinstance(layer, nn.Linear) and type(layer) is not nn.Linear for layer in layers):
        return DEQUANTIZE  # a class with a forward of its own, which reads the weight
    return DEQUANTIZE if _initialises(model, ()) and not _initialises(model, quantized) else ""


def names_in_files(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Module name -> what checkpoints call it, for the modules that transformers renames when it saves (Mixtral's
    ``mlp`` is ``block_sparse_moe`` there, for one). Other runtimes know the names of the files only."""
    if not hasattr(model, "_init_weights"):
        return {}  # not a model of transformers
    loaded = getattr(model, "_weight_conversions", None)
    if loaded is None:  # as transformers does it when it saves
        mapping = get_model_conversion_mapping(cast(Any, model), add_legacy=False)
        loaded = [conversion for conversion in mapping if not isinstance(conversion, PrefixChange)]
    back = [conversion.reverse_transform() for conversion in reversed(loaded) if isinstance(conversion, WeightRenaming)]
    found = {name: rename_source_key(f"{name}.weight", back, [])[0].removesuffix(".weight") for name in names}
    return {name: stored for name, stored in found.items() if stored != name}


def _splits(conversion: WeightConverter) -> bool:
    """Whether it makes several weights of one: transformers cannot let it collect scales, too."""
    several = len(conversion._original_target_patterns) > 1
    weights = all(pattern.endswith(".weight") for pattern in conversion._original_source_patterns)
    return several and weights and not any(getattr(op, "supports_many_to_many", False) for op in conversion.operations)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False  # within experts that are still fused
    return True


@torch.no_grad()
def _initialises(model: Any, packed: Collection[str]) -> bool:
    """Whether the model's code for initial weights runs over an empty model that lacks the weights of these layers."""
    try:
        with torch.device("meta"):
            empty = type(model)._from_config(copy.deepcopy(model.config))
        for name in packed:
            if _has(empty, name):
                empty.get_submodule(name)._parameters.pop("weight", None)
        for module in empty.modules():
            # leaves are marked as loaded; modules around them are not
            if not any(True for _ in module.parameters(recurse=False)):
                empty._init_weights(module)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return True
