"""QuantLinear: a linear layer whose weight is a QuantizedTensor, run by a kernel of the registry."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from hf_quant.grids import Scheme
from hf_quant.kernels import registry
from hf_quant.nn.packed import Layouts, PackedWeight
from hf_quant.tensor import QuantizedTensor

__all__ = ["Layouts", "QuantLinear"]


class QuantLinear(PackedWeight):
    """``y = x @ dequantize(weight).T + bias`` with a packed weight.

    Parameters: those of :class:`PackedWeight` and

        bias: ``[out]`` in the model's dtype, or None.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        scheme: grid, bits and group; the group divides ``in_features``.
        bias: whether there is a bias.
        dtype: of the bias (the model's dtype).
        scale_dtype: of the stored scales on the int grids.
        device: where the (empty) parameters are made.
        kernel: ``auto`` or a kernel's name (see :mod:`hf_quant.kernels.registry`).
        activations: ``int8`` allows the kernel to round the activations to 8 bits on the fly, ``float`` does not; the
            environment variable HF_QUANT_ACTIVATIONS wins over it.
    """

    FLOATS: ClassVar[tuple[str, ...]] = ("bias",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        kernel: str = registry.AUTO,
        activations: str = registry.FLOAT,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            scheme,
            scale_dtype=scale_dtype,
            device=device,
            kernel=kernel,
            activations=activations,
        )
        self.transposed_source = False  # the float layer was a Conv1D, whose weight is [in, out]
        if bias:
            self.bias: nn.Parameter | None = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_quantized(
        cls,
        tensor: QuantizedTensor,
        bias: torch.Tensor | None = None,
        kernel: str = registry.AUTO,
        activations: str = registry.FLOAT,
    ) -> QuantLinear:
        """A layer around an existing tensor (not copied)."""
        scale_dtype = tensor.scale.dtype if tensor.scale is not None else torch.float32
        layer = cls(
            tensor.shape[1],
            tensor.shape[0],
            tensor.scheme,
            bias=bias is not None,
            scale_dtype=scale_dtype,
            device="meta",
            kernel=kernel,
            activations=activations,
        )
        layer.assign(tensor)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in]`` -> ``[..., out]`` in ``x.dtype``."""
        if self._is_offloaded():
            return self._while_here(
                x.dtype, lambda ready: ready.selection.kernel.linear(x, ready.prepared, ready.spec, self.bias)
            )
        # the short way: this runs two hundred times for a token of a small model
        ready = self._ready
        if ready is None or ready.spec.dtype != x.dtype:
            ready = self._prepare(x.dtype)
        return ready.selection.kernel.linear(x, ready.prepared, ready.spec, self.bias)

    def extra_repr(self) -> str:
        kernel = self.kernel_name or self.kernel_request
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme.label}, "
            f"bias={self.bias is not None}, kernel={kernel}"
        )
