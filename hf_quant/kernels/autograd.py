"""Gradients for forward passes that autograd cannot see through."""

from __future__ import annotations

from typing import Any

import torch

from hf_quant.kernels.registry import Kernel, LayerSpec, Prepared


class _FrozenWeight(torch.autograd.Function):
    """Forward: the kernel's own product. Backward: ``grad @ weight`` with the weight dequantized to grad's dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, kernel: Kernel, prepared: Prepared, spec: LayerSpec
    ) -> torch.Tensor:
        ctx.kernel, ctx.prepared, ctx.spec = kernel, prepared, spec
        return y.view_as(y)

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
