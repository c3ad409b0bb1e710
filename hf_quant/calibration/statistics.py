"""What a layer sees, summed up: second moments of its inputs, streamed batch by batch, with a held-out share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_quant.nn.experts import Routed


@dataclass
class Moments:
    """Sums over tokens; X are the layer's inputs in the float model, Z in the model quantized so far.

    Attributes:
        hessian: float32 ``[in, in]``, Z^T Z.
        drift: float32 ``[in, in]``, Z^T (X - Z).
        residual: float32 ``[in, out]``, Z^T (R - S), R and S the residual streams (float, quantized) that the layer's
            output is added to; None where there is none.
        tokens: rows that went in.
    """

    hessian: torch.Tensor
    drift: torch.Tensor
    residual: torch.Tensor | None = None
    tokens: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> Moments:
        """Empty sums for layers with ``width`` inputs."""
        return cls(torch.zeros(width, width, device=device), torch.zeros(width, width, device=device))

    def add(self, seen: torch.Tensor, exact: torch.Tensor | None, gap: torch.Tensor | None) -> None:
        """Add one batch.

        Args:
            seen: float32 ``[n, in]``, inputs in the model quantized so far.
            exact: float32 ``[n, in]``, the same tokens in the float model; None when they cannot be matched (an expert
                that got other tokens), which counts as no drift.
            gap: float32 ``[n, out]``, float residual stream minus quantized residual stream, or None.
        """
        if not len(seen):
            return
        self.hessian.addmm_(seen.t(), seen)
        if exact is not None:
            self.drift.addmm_(seen.t(), exact - seen)
        if gap is not None:
            if self.residual is None:
                self.residual = torch.zeros(seen.shape[1], gap.shape[1], device=seen.device)
            self.residual.addmm_(seen.t(), gap)
        self.tokens += len(seen)

    def plus(self, other: Moments) -> Moments:
        """The sums over the tokens of both."""
        residual = self.residual
        if other.residual is not None:
            residual = other.residual if residual is None else residual + other.residual
        return Moments(self.hessian + other.hessian, self.drift + other.drift, residual, self.tokens + other.tokens)


def token_rows(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``[..., in]`` -> float32 ``[n, in]``; padding is dropped where the leading dimensions are those of the mask.

    Args:
        values: inputs of a layer, ``[batch, length, in]`` or flattened in any way.
        mask: ``[batch, length]``, non-zero for real tokens; None when nothing is padded.
    """
    if mask is not None:
        keep = mask.reshape(-1).bool()
        if values.shape[:-1] == mask.shape or values.shape[0] == keep.numel():
            return values.reshape(-1, values.shape[-1])[keep].to(torch.float32)
    return values.reshape(-1, values.shape[-1]).to(torch.float32)


def rows_of_same_tokens(
    seen: torch.Tensor, exact: torch.Tensor | None, routed: Routed, mask: torch.Tensor | None
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Inputs of an expert's layer, float32 ``[n, in]``: of the tokens that got there in both models, and of the others.

    Padding is dropped, and what is all zero: some models give all tokens to an expert, multiplied by nothing.
    """
    used = seen.abs().amax(1) > 0
    if mask is not None:
        used &= mask.reshape(-1).bool()[routed.rows]
    seen, rows = seen[used].to(torch.float32), routed.rows[used]
    other = None if exact is None else Routed.of(exact)
    if exact is None or other is None or other.tokens != routed.tokens:
        return [(seen, None)]
    place = torch.full((other.tokens,), -1, device=rows.device)
    place[other.rows] = torch.arange(len(other.rows), device=rows.device)
    found = place[rows]
    both = found >= 0
    return [(seen[both], exact[found[both]].to(torch.float32)), (seen[~both], None)]
