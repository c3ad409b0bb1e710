"""A QuantLinear whose columns were reordered before they were cut into groups (GPTQ's act-order)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_quant.nn.linear import QuantLinear
from hf_quant.tensor import QuantizedTensor


class OrderedQuantLinear(QuantLinear):
    """``y = x[..., order] @ stored.T + bias``: kernels see contiguous groups, the inputs are gathered before them.

    Parameters, besides those of :class:`QuantLinear`:
        weight_order: int32 ``[in]``; column j of the packed weight belongs to input ``weight_order[j]``.

    Args:
        as :class:`QuantLinear`.
    """

    weight_order: nn.Parameter
    REORDERS = True

    def __init__(self, in_features: int, *args: Any, device: torch.device | str | None = None, **kwargs: Any) -> None:
        super().__init__(in_features, *args, device=device, **kwargs)
        order = torch.empty(in_features, dtype=torch.int32, device=device)
        self.weight_order = nn.Parameter(order, requires_grad=False)

    def named_tensors(self, tensor: QuantizedTensor) -> dict[str, nn.Parameter]:
        """The parameters that hold ``tensor``, by name; raises FormatError when it belongs to another layer."""
        found = super().named_tensors(tensor)
        assert tensor.order is not None
        found["weight_order"] = nn.Parameter(tensor.order, requires_grad=False)
        return found

    def quantized(self) -> QuantizedTensor:
        """The weight in the canonical packing with its order, bit for bit what was loaded or assigned."""
        return replace(self._stored(), order=self.weight_order.data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in]`` -> ``[..., out]`` in ``x.dtype``."""
        return super().forward(x.index_select(-1, self.weight_order))
