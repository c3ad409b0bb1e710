"""Gradients, leading dimensions and bias around products that autograd cannot see through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_quant.errors import KernelError
from hf_quant.kernels.registry import Kernel, LayerSpec, Prepared

Product = Callable[[torch.Tensor, Prepared, LayerSpec, "torch.Tensor | None"], torch.Tensor]


class _FrozenWeight(torch.autograd.Function):
    """Forward: the kernel's own product. Backward: ``grad @ weight`` with the weight dequantized to grad's dtype.

    The dequantized weight is made again in the backward pass and never kept: training holds no float copy of a layer.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, kernel: Kernel, prepared: Prepared, spec: LayerSpec
    ) -> torch.Tensor:
        ctx.kernel, ctx.prepared, ctx.spec = kernel, prepared, spec
        if torch.compiler.is_compiling():
            return y.view_as(y)
        # the same memory, but no view: autograd forbids models to write into a view that a function returns
        return y.new_empty(0).set_(y)  # type: ignore[call-overload]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight = ctx.kernel.dequantize(ctx.prepared, ctx.spec, grads[0].dtype)
        return grads[0] @ weight, None, None, None, None


def with_input_gradient(
    x: torch.Tensor, y: torch.Tensor, kernel: Kernel, prepared: Prepared, spec: LayerSpec
) -> torch.Tensor:
    """``y`` (computed from ``x.detach()``), tied to ``x`` as ``x @ weight.T`` with a weight that never trains."""
    result: torch.Tensor = _FrozenWeight.apply(x, y, kernel, prepared, spec)
    return result


def linear_by_rows(
    kernel: Kernel,
    product: Product,
    x: torch.Tensor,
    prepared: Prepared,
    spec: LayerSpec,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """A whole :meth:`Kernel.linear` from a product of contiguous rows ``[rows, in]`` -> ``[rows, out]``.

    Raises:
        KernelError: ``x`` does not have ``in_features`` columns.
    """
    if x.shape[-1] != spec.in_features:
        raise KernelError(
            f"x has {x.shape[-1]} columns, but the weight is [{spec.out_features}, {spec.in_features}].",
            "the layer before this one gives another width.",
        )
    training = torch.is_grad_enabled()
    trains = training and x.requires_grad
    trains_bias = training and bias is not None and bias.requires_grad
    fused = None if bias is None or trains_bias else bias.to(x.dtype)
    rows = (x.detach() if trains else x).reshape(-1, spec.in_features).contiguous()
    y = product(rows, prepared, spec, fused).view(*x.shape[:-1], spec.out_features)
    if trains:
        y = with_input_gradient(x, y, kernel, prepared, spec)
    return y + bias.to(x.dtype) if trains_bias and bias is not None else y
