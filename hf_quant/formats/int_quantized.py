"""compressed-tensors ``int-quantized`` and ``naive-quantized``, weight-only: one int8 per code.

One module on disk: ``weight`` int8 ``[out, in]`` of signed codes (of 4 or 8 bits), ``weight_scale`` ``[out, groups]``,
and on the asymmetric grid ``weight_zero_point`` int8 ``[out, groups]``. Our codes are theirs plus ``2**(bits-1)``.
Their config is that of ``pack-quantized`` with another ``format``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_quant.errors import FormatError
from hf_quant.formats import compressed_tensors, fields
from hf_quant.grids import Scheme
from hf_quant.tensor import QuantizedTensor

if TYPE_CHECKING:
    from hf_quant.plan import Plan

WEIGHT, SCALE, ZERO = "weight", compressed_tensors.SCALE, compressed_tensors.ZERO


@dataclass(frozen=True)
class IntQuantized:
    """One of the two names of the layout, which is also what the config's ``format`` says."""

    NAME: str
    SUFFIXES = (WEIGHT, SCALE, ZERO)
    SCALE = SCALE

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The tensors that a module of this scheme has on disk, besides its bias."""
        return (WEIGHT, SCALE) if scheme.symmetric else self.SUFFIXES

    def holds(self, scheme: Scheme, kind: str, shape: tuple[int, ...]) -> str | None:
        """Why this format cannot hold a layer; None when it can."""
        return compressed_tensors.holds(scheme, kind, shape)

    def encode(self, tensor: QuantizedTensor, *, dtype: torch.dtype, name: str = "") -> dict[str, torch.Tensor]:
        """The tensors of one module; raises FormatError for a scheme that the format cannot hold."""
        reason = self.holds(tensor.scheme, "Linear", tensor.shape)
        if reason is None and tensor.order is not None:
            reason = f"its columns are reordered (GPTQ's act-order), which {self.NAME} does not read"
        if reason is not None:
            raise FormatError(
                f"{name or 'the weight'} cannot be written: {reason}.", "choose another scheme or format."
            )
        encoded = {WEIGHT: _signed(tensor.codes(), tensor.scheme), SCALE: tensor.scales().contiguous()}
        if tensor.zero_point is not None:
            encoded[ZERO] = _signed(tensor.zero_point, tensor.scheme)
        return encoded

    def decode(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme, *, name: str = "") -> QuantizedTensor:
        """The weight of one module.

        Args:
            tensors: suffix (see ``SUFFIXES``) -> tensor, nothing else.
            scheme: what the config says about this module.
            name: module name for errors.

        Raises:
            FormatError: a tensor is missing, unknown, or not of the dtype, shape or range that the scheme implies.
        """
        fields.check_suffixes(tensors, self.SUFFIXES, name, self.NAME)
        weight = fields.take(tensors, WEIGHT, name, (torch.int8,), (None, None))
        rows, columns = weight.shape
        reason = self.holds(scheme, "Linear", (rows, columns))
        if reason is not None:
            raise FormatError(f"{fields.label(name, WEIGHT)} is {[rows, columns]}: {reason}.", compressed_tensors.OTHER)
        groups = scheme.groups(columns)
        scale = fields.take(tensors, SCALE, name, fields.FLOATS, (rows, groups))
        fields.check_finite(scale, name, SCALE)
        zero = None
        if not scheme.symmetric:
            stored = fields.take(tensors, ZERO, name, (torch.int8,), (rows, groups))
            zero = _unsigned(stored, scheme, fields.label(name, ZERO))
        elif ZERO in tensors:
            raise FormatError(
                f"{fields.label(name, ZERO)} is there, but the scheme is {scheme.label}.",
                "the config and the file disagree.",
            )
        codes = _unsigned(weight, scheme, fields.label(name, WEIGHT))
        return QuantizedTensor.from_codes(codes, scale.contiguous(), zero, scheme)

    def quantization_config(self, plan: Plan, *, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """As :func:`hf_quant.formats.compressed_tensors.quantization_config`, for this storage."""
        return compressed_tensors.quantization_config(plan, dtype=dtype, storage=self.NAME)

    def read_config(self, config: Mapping[str, Any]) -> compressed_tensors.Resolver:
        """As :func:`hf_quant.formats.compressed_tensors.read_config`, for this storage."""
        return compressed_tensors.read_config(config, storage=self.NAME)

    def stock_loading(self, plan: Plan) -> str:
        """One sentence for the model card: what stock transformers needs to load this plan's checkpoint."""
        return "Stock transformers loads it with `pip install compressed-tensors`."


def stored_as(config: Mapping[str, Any]) -> str | None:
    """``int-quantized`` or ``naive-quantized`` when a compressed-tensors config says so of all groups, else None."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping):
        return None
    found = {(g.get("format") if isinstance(g, Mapping) else None) or config.get("format") for g in groups.values()}
    only = next(iter(found)) if len(found) == 1 else None
    return only if only in (INT.NAME, NAIVE.NAME) else None


def _signed(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return (codes.to(torch.int16) - scheme.implied_zero_point).to(torch.int8)


def _unsigned(stored: torch.Tensor, scheme: Scheme, where: str) -> torch.Tensor:
    codes = stored.to(torch.int16) + scheme.implied_zero_point
    if bool(((codes < 0) | (codes >= 1 << scheme.bits)).any()):
        raise FormatError(f"{where} holds codes beyond {scheme.bits} bits.", "the config and the file disagree.")
    return codes.to(torch.uint8)


INT = IntQuantized("int-quantized")
NAIVE = IntQuantized("naive-quantized")
