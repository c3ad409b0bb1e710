"""Typed look-ups in the tensors of one module: what is missing, misplaced or misshapen is named."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from hf_quant.errors import FormatError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_DAMAGED = "the file is damaged, or the config does not describe it; download or quantize it again."


def label(name: str, suffix: str) -> str:
    """``model.layers.0.fc1.weight_scale``, or the bare suffix when the module is not known."""
    return f"{name}.{suffix}" if name else suffix


def check_suffixes(tensors: Mapping[str, torch.Tensor], known: Collection[str], name: str, format_name: str) -> None:
    """Raise FormatError for a tensor that the format does not have."""
    for suffix in tensors:
        if suffix not in known:
            raise FormatError(
                f"{label(name, suffix)} is not a tensor of {format_name} as hf-quant reads it.",
                f"expected only {', '.join(known)}.",
            )


def take(
    tensors: Mapping[str, torch.Tensor],
    suffix: str,
    name: str,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None],
) -> torch.Tensor:
    """The tensor at ``suffix``; raises FormatError when it is absent or not of the dtype and shape (None: any size)."""
    tensor = tensors.get(suffix)
    if tensor is None:
        raise FormatError(f"{label(name, suffix)} is missing.", _DAMAGED)
    fits = tensor.dim() == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes:
        wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise FormatError(
            f"{label(name, suffix)} is {_short(tensor.dtype)} {list(tensor.shape)}, "
            f"expected {' or '.join(map(_short, dtypes))} {wanted}.",
            _DAMAGED,
        )
    return tensor


def check_finite(tensor: torch.Tensor, name: str, suffix: str) -> None:
    """Raise FormatError when scales hold NaN or Inf: every weight of their group would."""
    if not bool(torch.isfinite(tensor).all()):
        raise FormatError(f"{label(name, suffix)} holds NaN or Inf.", _DAMAGED)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
