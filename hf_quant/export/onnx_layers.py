"""Quantized layers as ONNX nodes: packed codes go into the graph, a float weight is never made.

int4: ``com.microsoft::MatMulNBits`` of onnxruntime (ContribOperators.md). B is ``[out, blocks, block / 2]`` with the
even column in the low nibble, which is our canonical packing cut into blocks; scales are ``[out, blocks]``, zero points
are packed like codes, and symmetric codes count from 8. Blocks are powers of two from 16: a group of 96 columns becomes
three blocks of 32 with one scale.

int8: ``DequantizeLinear`` (ONNX opset 21, ``block_size``) in front of a ``MatMul``: the weight is ``[in, out]``, signed
without zero points when symmetric. onnxruntime merges the two and keeps the codes packed.

Tables of embeddings: ``com.microsoft::GatherBlockQuantized`` on uint8 codes, packed as above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_quant.errors import FormatError
from hf_quant.export.tracing import refuse_experts
from hf_quant.nn.embedding import QuantEmbedding
from hf_quant.nn.linear import QuantLinear
from hf_quant.nn.swap import quantized_modules, shared_heads
from hf_quant.tensor import QuantizedTensor, pack_codes

OPSET = 21
MICROSOFT = "com.microsoft"
_LEAST, _MOST = 16, 256  # columns of a block: the least of the specification, the most that the CPU's kernels take
_INT8_INPUTS = 4  # accuracy_level: inputs may be rounded to 8 bits, block by block
_ANOTHER = "choose another --to, or quantize the float model again in groups of 32, 64 or 128 (grid=int)."


def holds(tensor: QuantizedTensor, looked_up: bool = False) -> str | None:
    """Why the nodes above cannot hold a weight; None when they can."""
    scheme, columns = tensor.scheme, tensor.shape[1]
    if scheme.grid != "int":
        return f"MatMulNBits holds evenly spaced values, not {scheme.grid}"
    group = scheme.group(columns)
    if (scheme.bits == 4 or looked_up) and group % _LEAST:
        return f"its groups of {group} columns are not whole blocks of {_LEAST} or more (a power of two)"
    return None


def put_nodes(model: nn.Module, int8_inputs: bool = False) -> None:
    """Replace every quantized layer by one that :func:`torch.onnx.export` writes as nodes.

    Args:
        model: quantized by hf-quant.
        int8_inputs: allow 4-bit layers to round their inputs to 8 bits.

    Raises:
        FormatError: the nodes cannot hold a layer exactly; all layers are looked at before any is replaced.
    """
    layers, heads = dict(quantized_modules(model)), dict(shared_heads(model))
    refuse_experts(model)
    for name, layer in layers.items():
        reason = holds(layer.quantized(), isinstance(layer, QuantEmbedding))
        if reason is not None:
            raise FormatError(f"{name} cannot be converted: {reason}.", _ANOTHER)
    for name, head in heads.items():
        model.set_submodule(name, linear(head.table.quantized(), head.bias, int8_inputs))
    for name, layer in layers.items():
        if isinstance(layer, QuantEmbedding):
            model.set_submodule(name, PackedTable(layer.quantized(), layer.constant))
        else:
            assert isinstance(layer, QuantLinear)
            model.set_submodule(name, linear(layer.quantized(), layer.bias, int8_inputs))


def linear(tensor: QuantizedTensor, bias: torch.Tensor | None, int8_inputs: bool) -> nn.Module:
    """The layer that becomes nodes, for a weight of 4 or 8 bits; ``int8_inputs`` allows rounded inputs (int4)."""
    return NBits(tensor, bias, int8_inputs) if tensor.scheme.bits == 4 else Dequantized(tensor, bias)


def block_of(tensor: QuantizedTensor) -> int:
    """Columns of a block: the largest power of two up to 256 that divides the group."""
    group = tensor.scheme.group(tensor.shape[1])
    return min(group & -group, _MOST)


def blocked(tensor: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales float32 and zero points uint8, ``[out, in / block]``: those of a group for each of its blocks."""
    repeats = tensor.scheme.group(tensor.shape[1]) // block_of(tensor)
    zero = tensor.zero_point
    scale = tensor.scales().float().repeat_interleave(repeats, dim=1)
    return scale, None if zero is None else zero.repeat_interleave(repeats, dim=1)


def _node(
    name: str,
    inputs: Sequence[torch.Tensor | None],
    attributes: Mapping[str, int],
    shape: Sequence[Any],
    version: int,
) -> torch.Tensor:
    """One float32 node; missing inputs at the end are left out."""
    given = list(inputs)
    while given[-1] is None:
        given.pop()
    options: dict[str, Any] = dict(attributes)
    return torch.onnx.ops.symbolic(name, given, options, dtype=torch.float32, shape=shape, version=version)


class _Layer(nn.Module):
    """What becomes nodes: buffers, and where columns are reordered the order in which inputs are gathered."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bias: torch.Tensor | None
    order: torch.Tensor | None

    def __init__(self, tensor: QuantizedTensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self._put("order", None if tensor.order is None else tensor.order.long())
        self._put("bias", None if bias is None else bias.detach().float())

    def _put(self, name: str, value: torch.Tensor | None) -> None:
        self.register_buffer(name, None if value is None else value.contiguous(), persistent=False)

    def _ordered(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.order is None else x.index_select(-1, self.order)


class NBits(_Layer):
    """``y = x @ weight.T + bias`` as one MatMulNBits of 4-bit codes.

    Args:
        tensor: ``[out, in]`` on the int grid, 4 bits, in groups of whole blocks.
        bias: ``[out]`` or None.
        int8_inputs: allow inputs to be rounded to 8 bits (``accuracy_level=4``).
    """

    def __init__(self, tensor: QuantizedTensor, bias: torch.Tensor | None, int8_inputs: bool) -> None:
        super().__init__(tensor, bias)
        self.block = block_of(tensor)
        scale, zero = blocked(tensor)
        self._put("codes", pack_codes(tensor.codes(), 4).view(self.out_features, -1, self.block // 2))
        self._put("scale", scale)
        self._put("zero", None if zero is None else pack_codes(zero, 4))
        self.attributes = {"K": self.in_features, "N": self.out_features, "bits": 4, "block_size": self.block}
        if int8_inputs:
            self.attributes["accuracy_level"] = _INT8_INPUTS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in]`` -> ``[..., out]``, float32."""
        inputs = [self._ordered(x), self.codes, self.scale, self.zero, None, self.bias]
        shape = (*x.shape[:-1], self.out_features)
        return _node(f"{MICROSOFT}::MatMulNBits", inputs, self.attributes, shape, 1)


class Dequantized(_Layer):
    """``y = x @ weight.T + bias`` as a MatMul behind a DequantizeLinear of 8-bit codes.

    Args:
        tensor: ``[out, in]`` on the int grid, 8 bits.
        bias: ``[out]`` or None.
    """

    def __init__(self, tensor: QuantizedTensor, bias: torch.Tensor | None) -> None:
        super().__init__(tensor, bias)
        codes, scale, zero = tensor.codes(), tensor.scales().float(), tensor.zero_point
        # code - 128 as a signed byte
        stored = (codes ^ 128).view(torch.int8) if zero is None else codes
        rows = scale.shape[1] == 1  # one scale per output
        self._put("codes", stored.t())
        self._put("scale", scale[:, 0] if rows else scale.t())
        self._put("zero", None if zero is None else (zero[:, 0] if rows else zero.t()))
        group = tensor.scheme.group(self.in_features)
        self.attributes = {"axis": 1} if rows else {"axis": 0, "block_size": group}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in]`` -> ``[..., out]``, float32."""
        inputs = [self.codes, self.scale, self.zero]
        shape = (self.in_features, self.out_features)
        weight = _node("DequantizeLinear", inputs, self.attributes, shape, OPSET)
        y = torch.matmul(self._ordered(x), weight)
        return y if self.bias is None else y + self.bias


class PackedTable(_Layer):
    """``table[ids]`` as one GatherBlockQuantized, times the constant of embeddings that have one.

    Args:
        tensor: ``[rows, columns]`` on the int grid, in groups of whole blocks.
        constant: what is looked up is multiplied by it (and whether it is rounded to the model's dtype first).
    """

    def __init__(self, tensor: QuantizedTensor, constant: tuple[float, bool] | None) -> None:
        super().__init__(tensor, None)
        self.num_embeddings, self.embedding_dim = tensor.shape
        self.factor = None if constant is None else constant[0]
        scale, zero = blocked(tensor)
        bits = tensor.scheme.bits
        self._put("codes", pack_codes(tensor.codes(), bits))
        self._put("scale", scale)
        self._put("zero", None if zero is None else pack_codes(zero, bits))
        self.attributes = {"bits": bits, "block_size": block_of(tensor), "gather_axis": 0, "quantize_axis": 1}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids [...]`` -> float32 ``[..., columns]``; an id outside gives zeros."""
        inputs = [self.codes, ids, self.scale, self.zero]
        shape = (*ids.shape, self.embedding_dim)
        found = _node(f"{MICROSOFT}::GatherBlockQuantized", inputs, self.attributes, shape, 1)
        return found if self.factor is None else found * self.factor
