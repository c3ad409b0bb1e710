"""Quantized layers as the operators that ExecuTorch's XNNPACK backend takes for packed weights.

A layer is a weight that is dequantized (``quantized_decomposed``) in front of a product, and inputs that are rounded to
8 bits token by token: that is the only way in which XNNPACK multiplies with weights of few bits. The partitioner
recognizes the pattern and stores the codes:

    int4 symmetric, groups of a multiple of 32   4-bit blocks; their scales are bfloat16
    int4 and int8 symmetric, per channel         one float32 scale for each output

Tables of embeddings are ``embedding_4bit`` and ``embedding_byte`` of ExecuTorch's quantized kernels, symmetric, with
float32 scales.
"""

from __future__ import annotations

from typing import Any

# it defines embedding_4bit and embedding_byte
import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401
import torch
from torch import nn

from hf_quant.errors import FormatError
from hf_quant.export.tracing import refuse_experts
from hf_quant.nn.embedding import QuantEmbedding
from hf_quant.nn.linear import QuantLinear
from hf_quant.nn.swap import quantized_modules, shared_heads
from hf_quant.tensor import QuantizedTensor

_BLOCK = 32  # XNNPACK: groups are a multiple of it
_ANOTHER = (
    "choose another --to, or quantize the float model again: bits=4 in groups of 32, 64 or 128, or bits=8, "
    "group_size=-1; both symmetric."
)
_ops: Any = torch.ops.quantized_decomposed


def holds(tensor: QuantizedTensor, looked_up: bool = False) -> str | None:
    """Why the operators above cannot hold a weight; None when they can."""
    scheme, columns = tensor.scheme, tensor.shape[1]
    if scheme.grid != "int":
        return f"XNNPACK has evenly spaced values, not {scheme.grid}"
    if not scheme.symmetric:
        return "XNNPACK's packed weights have no zero points"
    if columns % 2:
        return f"two columns share a byte, and it has {columns}"
    scale = tensor.scales().float()
    if not bool((scale.isfinite() & ((scale == 0) | (scale >= torch.finfo(torch.float32).smallest_normal))).all()):
        return "one of its scales is not a normal positive number"
    group = scheme.group(columns)
    if looked_up or group == columns:
        return None
    if scheme.bits == 8:
        return f"XNNPACK's 8-bit weights have one scale per output, not groups of {group}"
    if group % _BLOCK:
        return f"XNNPACK's 4-bit weights are in groups of a multiple of {_BLOCK} columns, not {group}"
    if not torch.equal(scale.to(torch.bfloat16).float(), scale):
        return "its scales are no bfloat16 numbers, which is what XNNPACK stores (quantize with scale_dtype=bfloat16)"
    return None


def put_operators(model: nn.Module) -> None:
    """Replace every quantized layer by its operators.

    Raises:
        FormatError: they cannot hold a layer exactly; all layers are looked at before any is replaced.
    """
    layers, heads = dict(quantized_modules(model)), dict(shared_heads(model))
    refuse_experts(model)
    weights = {name: (layer.quantized(), isinstance(layer, QuantEmbedding)) for name, layer in layers.items()}
    weights |= {name: (head.table.quantized(), False) for name, head in heads.items()}
    for name, (tensor, looked_up) in weights.items():
        reason = holds(tensor, looked_up)
        if reason is not None:
            raise FormatError(f"{name} cannot be converted: {reason}.", _ANOTHER)
    for name, head in heads.items():
        model.set_submodule(name, Product(head.table.quantized(), head.bias))
    for name, layer in layers.items():
        if isinstance(layer, QuantEmbedding):
            model.set_submodule(name, Table(layer.quantized(), layer.constant))
        else:
            assert isinstance(layer, QuantLinear)
            model.set_submodule(name, Product(layer.quantized(), layer.bias))


class _Layer(nn.Module):
    """Codes as signed bytes ``[out, in]`` and scales float32 ``[out, groups]``."""

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__()
        self.bits, self.group = tensor.scheme.bits, tensor.scheme.group(tensor.shape[1])
        self.least, self.most = -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        signed = (tensor.codes().to(torch.int16) + self.least).to(torch.int8)
        scale = tensor.scales().float()
        # XNNPACK refuses a scale of 0 (a row of padding has it): zeros times 1 are the same weights
        empty = scale == 0
        signed = signed.masked_fill(empty.repeat_interleave(self.group, dim=1), 0)
        self.register_buffer("codes", signed, persistent=False)
        self.register_buffer("scale", scale.masked_fill(empty, 1).contiguous(), persistent=False)


class Product(_Layer):
    """``y = round(x) @ weight.T + bias``, inputs rounded to 8 bits token by token.

    Args:
        tensor: ``[out, in]``, one that :func:`holds` accepts.
        bias: ``[out]`` or None.
    """

    bias: torch.Tensor | None
    order: torch.Tensor | None
    zero: torch.Tensor

    def __init__(self, tensor: QuantizedTensor, bias: torch.Tensor | None) -> None:
        super().__init__(tensor)
        self.in_features, self.out_features = tensor.shape[1], tensor.shape[0]
        self.grouped = self.scale.shape[1] > 1
        if not self.grouped:
            self.scale = self.scale[:, 0].contiguous()
        zero = torch.zeros(self.scale.shape, dtype=torch.int8 if self.grouped else torch.int64)
        self.register_buffer("zero", zero, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().float(), persistent=False)
        self.register_buffer("order", None if tensor.order is None else tensor.order.long(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in]`` -> ``[..., out]``, float32."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        scale, zero = _ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
        rounded = _ops.quantize_per_token.default(x, scale, zero, -128, 127, torch.int8)
        x = _ops.dequantize_per_token.default(rounded, scale, zero, -128, 127, torch.int8, torch.float32)
        stored, limits = (self.codes, self.scale, self.zero), (self.least, self.most, torch.int8)
        if self.grouped:
            weight = _ops.dequantize_per_channel_group.default(*stored, *limits, self.group, torch.float32)
        else:
            weight = _ops.dequantize_per_channel.default(*stored, 0, *limits)
        return nn.functional.linear(x, weight, self.bias)


class Table(_Layer):
    """``table[ids]``, times the constant of embeddings that have one.

    Args:
        tensor: ``[rows, columns]``, one that :func:`holds` accepts.
        constant: what is looked up is multiplied by it (and whether it is rounded to the model's dtype first).
    """

    def __init__(self, tensor: QuantizedTensor, constant: tuple[float, bool] | None) -> None:
        super().__init__(tensor)
        self.num_embeddings, self.embedding_dim = tensor.shape
        self.factor = None if constant is None else constant[0]
        if self.bits == 4:  # two in a byte, the even column above
            unsigned = (self.codes.to(torch.int16) - self.least).to(torch.uint8)
            self.codes = (unsigned[:, 0::2] << 4) | unsigned[:, 1::2]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids [...]`` -> float32 ``[..., columns]``."""
        lookup = _ops.embedding_4bit.dtype if self.bits == 4 else _ops.embedding_byte.dtype
        found = lookup(self.codes, self.scale, None, self.least, self.most, ids, dtype=torch.float32)
        return found if self.factor is None else found * self.factor
