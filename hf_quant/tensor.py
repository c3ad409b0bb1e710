"""QuantizedTensor: the codes, scales and zero points of one weight, and the canonical packing, known nowhere else.

Canonical packing: one uint8 per code at 8 bits; at 4 bits two codes per byte, the even column in the low nibble, rows
padded to a whole byte. Codes are unsigned; see :mod:`hf_quant.grids` for what they stand for.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch

from hf_quant.errors import FormatError
from hf_quant.grids import DOUBLE_QUANT_BLOCK, Scheme, decode


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes ``[out, in]`` -> canonical bytes ``[out, in]`` (8 bits) or ``[out, ceil(in/2)]`` (4 bits)."""
    if bits == 8:
        return codes.contiguous()
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_codes(packed: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """The inverse of :func:`pack_codes`: uint8 ``[out, in]``."""
    if bits == 8:
        return packed
    if sys.byteorder == "big":
        return torch.stack((packed & 15, packed >> 4), dim=-1).view(packed.shape[0], -1)[:, :in_features]
    # both nibbles of a byte at once, as the two bytes of an int16: a third of the time of interleaving them
    wide = packed.to(torch.int16)
    return (wide << 4).bitwise_or_(wide).bitwise_and_(0x0F0F).view(torch.uint8)[:, :in_features]


@dataclass(frozen=True)
class DoubleQuant:
    """Scales stored as 8-bit codes, bit for bit as bitsandbytes nests its absmax (QLoRA, section 3).

    scale[i] = table[codes[i]] * absmax[i // 256] + offset, flattened over ``[out, in/group]``.

    Attributes:
        codes: uint8 ``[out, in/group]``.
        absmax: float32 ``[ceil(out*in/group / 256)]``.
        offset: float32 scalar tensor (0-dim).
        table: float32 ``[256]``.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor
    table: torch.Tensor

    def scale(self) -> torch.Tensor:
        """The scales as float32 ``[out, in/group]``."""
        flat = self.table[self.codes.reshape(-1).to(torch.int32)]
        blocks = self.absmax.repeat_interleave(DOUBLE_QUANT_BLOCK)[: flat.numel()]
        return (flat * blocks + self.offset).view(self.codes.shape)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.codes, self.absmax, self.offset, self.table)


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized weight.

    Attributes:
        packed: uint8, canonical packing of the codes of ``[out, in]``.
        scale: ``[out, in/group]`` in bfloat16, float16 or float32; None when ``nested`` holds the scales.
        zero_point: uint8 ``[out, in/group]`` on the asymmetric int grid, else None.
        scheme: the grid and its layout.
        shape: ``(out, in)``.
        nested: double-quantized scales (table grids with ``double_quant``), else None.
        order: int32 ``[in]`` when the columns were reordered before they were cut into groups (GPTQ's act-order):
            column j of the codes is column ``order[j]`` of the weight. None when every column is in its place.
    """

    packed: torch.Tensor
    scale: torch.Tensor | None
    zero_point: torch.Tensor | None
    scheme: Scheme
    shape: tuple[int, int]
    nested: DoubleQuant | None = None
    order: torch.Tensor | None = None

    def __post_init__(self) -> None:
        out, columns = self.shape
        width = columns if self.scheme.bits == 8 else (columns + 1) // 2
        groups = self.scheme.groups(columns)
        self._check("packed", self.packed, (out, width), (torch.uint8,))
        if (self.scale is None) == (self.nested is None):
            raise FormatError("a quantized tensor needs either scale or nested scales.", "pass exactly one of them.")
        if self.scale is not None:
            floats = (torch.bfloat16, torch.float16, torch.float32)
            self._check("scale", self.scale, (out, groups), floats)
        if self.nested is not None:
            self._check("nested codes", self.nested.codes, (out, groups), (torch.uint8,))
        if self.scheme.symmetric != (self.zero_point is None):
            raise FormatError(
                f"scheme {self.scheme.label} and zero_point disagree.", "asymmetric int needs zero points, no other."
            )
        if self.zero_point is not None:
            self._check("zero_point", self.zero_point, (out, groups), (torch.uint8,))
        if self.order is not None:
            self._check("order", self.order, (columns,), (torch.int32,))

    @staticmethod
    def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            expected = f"{' or '.join(map(str, dtypes))} {list(shape)}"
            raise FormatError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {expected}.",
                "the tensors belong to another shape or scheme, or the file is damaged.",
            )

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scale: torch.Tensor | DoubleQuant,
        zero_point: torch.Tensor | None,
        scheme: Scheme,
    ) -> QuantizedTensor:
        """Pack uint8 codes ``[out, in]`` with their scales; raises FormatError when shapes or dtypes disagree."""
        nested = scale if isinstance(scale, DoubleQuant) else None
        plain = None if isinstance(scale, DoubleQuant) else scale
        shape = (codes.shape[0], codes.shape[1])
        return cls(pack_codes(codes, scheme.bits), plain, zero_point, scheme, shape, nested)

    def codes(self) -> torch.Tensor:
        """uint8 codes ``[out, in]``, one per element, in the order in which they are stored (see ``order``)."""
        return unpack_codes(self.packed, self.scheme.bits, self.shape[1])

    def scales(self) -> torch.Tensor:
        """Plain scales ``[out, in/group]``: as stored, or float32 when they are nested."""
        if self.scale is not None:
            return self.scale
        assert self.nested is not None
        return self.nested.scale()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight ``[out, in]`` that this tensor stands for: computed in float32, rounded once to ``dtype``."""
        stored = decode(self.codes(), self.scales(), self.zero_point, self.scheme).to(dtype)
        return stored if self.order is None else torch.empty_like(stored).index_copy_(1, self.order.long(), stored)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Every tensor that is stored."""
        scales = (self.scale,) if self.nested is None else self.nested.tensors()
        return tuple(t for t in (self.packed, *scales, self.zero_point, self.order) if t is not None)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """A copy on ``device``; dtypes never change."""
        nested = self.nested and DoubleQuant(*(t.to(device) for t in self.nested.tensors()))
        return replace(
            self,
            packed=self.packed.to(device),
            scale=None if self.scale is None else self.scale.to(device),
            zero_point=None if self.zero_point is None else self.zero_point.to(device),
            nested=nested,
            order=None if self.order is None else self.order.to(device),
        )
