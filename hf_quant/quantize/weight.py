"""One float weight -> one QuantizedTensor by the method asked for, in chunks of rows that stay in cache."""

from __future__ import annotations

import torch

from hf_quant.errors import WeightError
from hf_quant.grids import Scheme
from hf_quant.quantize.absmax import absmax_scales
from hf_quant.quantize.double_quant import nest
from hf_quant.quantize.rounding import nearest_codes, nearest_values
from hf_quant.quantize.search import default_importance, search_scales
from hf_quant.tensor import QuantizedTensor, pack_codes

CHUNK = 1 << 18  # weights worked on at once: a few float32 buffers of this size stay in a last-level cache
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize_weight(
    weight: torch.Tensor,
    scheme: Scheme,
    method: str = "search",
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
    importance: torch.Tensor | None = None,
    name: str = "weight",
) -> QuantizedTensor:
    """Quantize ``weight [out, in]``; the group of ``scheme`` must divide ``in``.

    Args:
        weight: float32, bfloat16 or float16, finite.
        scheme: grid, bits and group.
        method: ``search`` or ``absmax``.
        scale_dtype: dtype of the stored scales on the int grids (table grids store float32 or nested scales).
        importance: float32 ``[in]``, positive: how much an input column's error matters (``search`` only); None takes
            :func:`hf_quant.quantize.search.default_importance`.
        name: named in errors.

    Raises:
        WeightError: NaN or Inf in the weight, or a dtype that is not a float.
    """
    if weight.dtype not in FLOATS:
        raise WeightError(f"{name} is {weight.dtype}.", "quantize from float32, bfloat16 or float16 weights.")
    rows, columns = weight.shape
    group = scheme.group(columns)
    scheme.groups(columns)
    stored = scale_dtype if scheme.grid == "int" else torch.float32
    chunk = max(1, CHUNK // columns)
    scales = torch.empty(rows, columns // group, dtype=torch.float32, device=weight.device)
    zeros = None if scheme.symmetric else torch.empty_like(scales, dtype=torch.uint8)
    width = columns if scheme.bits == 8 else (columns + 1) // 2
    packed = torch.empty(rows, width, dtype=torch.uint8, device=weight.device)
    weigh = None if importance is None else importance.to(torch.float32).view(-1, group)
    for start in range(0, rows, chunk):
        piece = slice(start, min(start + chunk, rows))
        groups = _groups(weight, piece, group)
        if not torch.isfinite(groups.sum()) and not torch.isfinite(groups).all():
            raise WeightError(
                f"{name} holds NaN or Inf in rows {piece.start}-{piece.stop - 1}.", "repair the float checkpoint first."
            )
        spread = None if weigh is None else weigh.repeat(groups.shape[0] // weigh.shape[0], 1)
        scale, zero = _choose(groups, scheme, method, stored, spread)
        scales[piece] = scale.view(-1, columns // group)
        if zeros is not None and zero is not None:
            zeros[piece] = zero.view(-1, columns // group).to(torch.uint8)
        if not scheme.double_quant:
            packed[piece] = _pack(groups, scale, zero, scheme, columns)
    shape = (rows, columns)
    if not scheme.double_quant:
        return QuantizedTensor(packed, scales.to(stored), zeros, scheme, shape)
    nested = nest(scales)
    exact = nested.scale()
    for start in range(0, rows, chunk):
        piece = slice(start, min(start + chunk, rows))
        groups = _groups(weight, piece, group)
        packed[piece] = _pack(groups, exact[piece].reshape(-1), None, scheme, columns)
    return QuantizedTensor(packed, None, None, scheme, shape, nested)


def _groups(weight: torch.Tensor, rows: slice, group: int) -> torch.Tensor:
    """Some rows as float32 ``[n, group]``, contiguous also when the weight is a transposed view (Conv1D)."""
    return weight[rows].to(torch.float32).contiguous().view(-1, group)


def _pack(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme, columns: int
) -> torch.Tensor:
    codes = nearest_codes(groups, scale, zero, scheme)
    return pack_codes(codes.view(-1, columns), scheme.bits)


def _choose(
    groups: torch.Tensor, scheme: Scheme, method: str, stored: torch.dtype, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales rounded to their stored dtype; where rounding makes the search lose to the baseline, the baseline."""
    baseline, zero = absmax_scales(groups, scheme)
    baseline = _store(baseline, stored)
    if method == "absmax":
        return baseline, zero
    scale, found = search_scales(groups, scheme, importance)
    scale = _store(scale, stored)
    if importance is None:
        importance = default_importance(groups, scheme)
    worse = _error(groups, scale, found, scheme, importance) > _error(groups, baseline, zero, scheme, importance)
    scale = torch.where(worse, baseline, scale)
    if found is not None and zero is not None:
        found = torch.where(worse, zero, found)
    return scale, found


def _store(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale as it will be read back; float16 saturates instead of overflowing."""
    limit = torch.finfo(dtype).max
    return scale.clamp(-limit, limit).to(dtype).to(torch.float32)


def _error(
    groups: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: Scheme,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """Squared error per group ``[n]`` with nearest codes."""
    difference = nearest_values(groups, scale, zero, scheme).mul_(scale.unsqueeze(1)).sub_(groups).square_()
    return (difference if importance is None else difference.mul_(importance)).sum(1)
