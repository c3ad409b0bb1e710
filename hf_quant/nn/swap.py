"""Put QuantLinears into a model, read them out, and put plain float layers back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_quant.grids import Scheme
from hf_quant.kernels import registry
from hf_quant.nn.embedding import QuantEmbedding, SharedHead, embedding_of
from hf_quant.nn.linear import QuantLinear
from hf_quant.nn.ordered import OrderedQuantLinear
from hf_quant.nn.packed import PackedWeight
from hf_quant.tensor import QuantizedTensor


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """Every layer of a model that holds a packed weight, with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedWeight))


def shared_heads(model: nn.Module) -> Iterator[tuple[str, SharedHead]]:
    """Every layer of a model that computes with the packed table of an embedding, with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SharedHead))


def float_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of an ``nn.Linear``, an ``nn.Embedding`` or a ``Conv1D`` (which stores its weight transposed)."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    first, second = weight.shape
    return (second, first) if isinstance(module, Conv1D) else (first, second)


def put_empty(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    scale_dtype: torch.dtype,
    kernel: str,
    activations: str = registry.FLOAT,
    ordered: Collection[str] = (),
) -> None:
    """Replace the named float layers by empty QuantLinears on the meta device, to be filled by a loader.

    The columns of those in ``ordered`` are reordered.
    """
    for name, scheme in schemes.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            table = QuantEmbedding.standing_for(module, scheme, scale_dtype, kernel, activations)
            model.set_submodule(name, table)
            continue
        rows, columns = float_shape(module)
        bias = module.bias
        kind = OrderedQuantLinear if name in ordered else QuantLinear
        layer = kind(
            columns,
            rows,
            scheme,
            bias=bias is not None,
            dtype=bias.dtype if isinstance(bias, torch.Tensor) else None,
            scale_dtype=scale_dtype,
            device="meta",
            kernel=kernel,
            activations=activations,
        )
        layer.transposed_source = isinstance(module, Conv1D)
        layer.train(module.training)
        model.set_submodule(name, layer)


def put_quantized(
    model: nn.Module, name: str, tensor: QuantizedTensor, kernel: str, activations: str = registry.FLOAT
) -> None:
    """Replace one float layer by a quantized one that holds ``tensor``; the float weight is freed."""
    module = model.get_submodule(name)
    if isinstance(module, nn.Embedding):
        model.set_submodule(name, embedding_of(tensor, module, kernel, activations))
        return
    bias = module.bias
    given = bias if isinstance(bias, torch.Tensor) else None
    kind = QuantLinear if tensor.order is None else OrderedQuantLinear
    layer = kind.from_quantized(tensor, given, kernel, activations)
    layer.transposed_source = isinstance(module, Conv1D)
    layer.train(module.training)
    model.set_submodule(name, layer)


def share_tables(model: nn.Module, shares: Mapping[str, str]) -> None:
    """Let layers compute with the packed tables of embeddings: ``{layer: embedding}``, the embeddings in place."""
    for name, owner in shares.items():
        module, table = model.get_submodule(name), model.get_submodule(owner)
        assert isinstance(table, QuantEmbedding)
        bias = getattr(module, "bias", None)
        head = SharedHead(table, bias if isinstance(bias, torch.Tensor) else None)
        model.set_submodule(name, head.train(module.training))


def tied_to(model: nn.Module, name: str) -> str:
    """The module whose weight is that of module ``name``, where the model ties it to one; else empty."""
    tied = getattr(model, "all_tied_weights_keys", None)
    return tied.get(f"{name}.weight", "").removesuffix(".weight") if isinstance(tied, dict) else ""


def untie(model: nn.Module, name: str) -> None:
    """Let the weight of module ``name`` go its own way: no loader of this model may tie it to the embedding again."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for settings in (config, text):
        if getattr(settings, "tie_word_embeddings", None):
            settings.tie_word_embeddings = False
    tied = getattr(model, "all_tied_weights_keys", None)
    if isinstance(tied, dict):
        tied.pop(f"{name}.weight", None)


def put_float(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every QuantLinear by the float layer that it stands for, its weight rounded once to ``dtype``."""
    heads = list(shared_heads(model))
    for name, layer in list(quantized_modules(model)):
        plain: nn.Module
        if isinstance(layer, QuantEmbedding):
            model.set_submodule(name, layer.plain(dtype))
            tied = [(other, head) for other, head in heads if head.table is layer]
            for other, head in tied:
                plain = nn.Linear(layer.in_features, layer.out_features, bias=head.bias is not None, device="meta")
                plain.weight = model.get_parameter(f"{name}.weight")
                if head.bias is not None:
                    plain.bias = nn.Parameter(head.bias.detach().to(dtype))
                model.set_submodule(other, plain.train(head.training))
            continue
        assert isinstance(layer, QuantLinear)
        weight = layer.dequantize(dtype)
        if layer.transposed_source:
            plain = Conv1D(layer.out_features, layer.in_features)
            plain.weight = nn.Parameter(weight.t().contiguous())
            # a Conv1D always has a bias
            zeros = torch.zeros(layer.out_features, dtype=dtype, device=weight.device)
            plain.bias = nn.Parameter(zeros if layer.bias is None else layer.bias.detach().to(dtype))
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(weight)
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias.detach().to(dtype))
        plain.train(layer.training)
        model.set_submodule(name, plain)


@torch.no_grad()
def put_vectors(model: nn.Module, vectors: Mapping[str, torch.Tensor]) -> None:
    """Give float parameters (norms, biases) other values, rounded to the dtype that they have."""
    for name, value in vectors.items():
        model.get_parameter(name).copy_(value)
