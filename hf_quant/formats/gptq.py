"""GPTQ (v1 and v2): QuantizedTensor <-> the tensors of one module, Plan <-> its config.

One module on disk, as AutoGPTQ introduced it and GPTQModel writes it; codes are unsigned, and a weight is
``(code - zero) * scale``:

* ``qweight`` int32 ``[in*bits/32, out]``: in every output column the little-endian bit stream of its codes;
* ``qzeros`` int32 ``[groups, out*bits/32]``: in every group the bit stream of the zero points. Version 1 stores
  ``zero - 1`` (subtracted from whole words: a zero point of 0 borrows from the next one, and GPTQModel's loader adds it
  back in the same way), version 2 stores ``zero``. Symmetric weights have them too: ``2**(bits-1)`` everywhere;
* ``scales`` float16 (or bfloat16) ``[groups, out]``;
* ``g_idx`` int32 ``[in]``: the group of every input column; ``column // group_size`` unless the columns were quantized
  in the order of their activations (``desc_act``). Then groups are not contiguous: :func:`Gptq.decode` sorts the
  columns by group and keeps the order, exactly.

``Conv1D`` is stored as a linear layer ``[out, in]``. Transformers quantizes the linear layers of the blocks only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from hf_quant.errors import FormatError
from hf_quant.formats import fields
from hf_quant.formats.words import from_words, to_words, word_count
from hf_quant.grids import PER_CHANNEL, Scheme
from hf_quant.tensor import QuantizedTensor, pack_codes, unpack_codes

if TYPE_CHECKING:
    from hf_quant.plan import Plan

WEIGHT, ZEROS, SCALE, GROUPS = "qweight", "qzeros", "scales", "g_idx"
METHOD = "gptq"
_OTHER = "load it with stock transformers and gptqmodel."
Holds = Callable[[Scheme, str, tuple[int, ...]], str | None]
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
# where stock transformers looks for blocks when the config names none (optimum.gptq.constants)
_KNOWN_BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers")


@dataclass(frozen=True)
class Gptq:
    """One version of the format.

    Attributes:
        NAME: in :data:`hf_quant.formats.FORMATS`, and the config's ``checkpoint_format``.
        offset: what is subtracted from zero points before they are stored.
    """

    NAME: str
    offset: int
    SUFFIXES = (WEIGHT, ZEROS, SCALE, GROUPS)
    SCALE = SCALE
    PEEK = (ZEROS, GROUPS)  # the scheme depends on what these hold

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The tensors that a module has on disk, besides its bias."""
        return self.SUFFIXES

    def holds(self, scheme: Scheme, kind: str, shape: tuple[int, ...]) -> str | None:
        """Why this format cannot hold a layer; None when it can."""
        if scheme.grid != "int":
            return f"{self.NAME} holds integers, not {scheme.grid}; use format bitsandbytes"
        if kind not in ("Linear", "Conv1D"):
            return f"{self.NAME} quantizes nn.Linear and Conv1D, not {kind}"
        if len(shape) != 2:
            return f"{self.NAME} packs 2-D weights, not {list(shape)}"
        if shape[1] % scheme.group(shape[1]):
            return f"group_size={scheme.group(shape[1])} does not divide rows of {shape[1]}"
        per_word = 32 // scheme.bits
        if any(size % per_word for size in shape):
            return f"{self.NAME} packs {per_word} codes into a word, which does not divide {list(shape)}"
        return None

    def encode(self, tensor: QuantizedTensor, *, dtype: torch.dtype, name: str = "") -> dict[str, torch.Tensor]:
        """The tensors of one module; raises FormatError for what the format cannot hold."""
        reason = self.holds(tensor.scheme, "Linear", tensor.shape)
        if reason is not None:
            raise FormatError(
                f"{name or 'the weight'} cannot be written: {reason}.", "choose another scheme or format."
            )
        columns = tensor.shape[1]
        bits, group = tensor.scheme.bits, tensor.scheme.group(columns)
        packed, index = tensor.packed, torch.arange(columns, dtype=torch.int32, device=tensor.device) // group
        if tensor.order is not None:
            order = tensor.order.long()
            packed = pack_codes(torch.empty_like(tensor.codes()).index_copy_(1, order, tensor.codes()), bits)
            index = torch.empty_like(index).index_copy_(0, order, index)
        zeros = to_words(pack_codes(zero_points(tensor).t().contiguous(), bits))
        return {
            WEIGHT: to_words(packed).t().contiguous(),
            ZEROS: self._shift(zeros, bits, -self.offset),
            SCALE: tensor.scales().t().contiguous(),
            GROUPS: index,
        }

    def decode(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme, *, name: str = "") -> QuantizedTensor:
        """The weight ``[out, in]`` of one module.

        Args:
            tensors: suffix (see ``SUFFIXES``) -> tensor, nothing else.
            scheme: symmetric only where every zero point is the middle of the range (see :meth:`refine`).
            name: module name for errors.

        Raises:
            FormatError: a tensor is missing, unknown, damaged, or not what the scheme says.
        """
        fields.check_suffixes(tensors, self.SUFFIXES, name, self.NAME)
        columns = int(fields.take(tensors, GROUPS, name, (torch.int32, torch.int64), (None,)).shape[0])
        words = fields.take(tensors, WEIGHT, name, (torch.int32,), (word_count(columns, scheme.bits), None))
        rows, groups = int(words.shape[1]), scheme.groups(columns)
        reason = self.holds(scheme, "Linear", (rows, columns))
        if reason is not None:
            raise FormatError(f"{fields.label(name, WEIGHT)}: {reason}.", _OTHER)
        scale = fields.take(tensors, SCALE, name, _SCALES, (groups, rows))
        fields.check_finite(scale, name, SCALE)
        zero = self._zeros(tensors, scheme.bits, rows, groups, name)
        order = group_order(tensors[GROUPS], scheme.group(columns), name)
        packed = from_words(words.t().contiguous(), columns, scheme.bits)
        if order is not None:
            packed = pack_codes(unpack_codes(packed, scheme.bits, columns).index_select(1, order), scheme.bits)
        zero_point = zero.t().contiguous()
        if scheme.symmetric:
            check_implied(zero_point, scheme, name, ZEROS)
        return QuantizedTensor(
            packed,
            scale.t().contiguous(),
            None if scheme.symmetric else zero_point,
            scheme,
            (rows, columns),
            order=order,
        )

    def refine(
        self, scheme: Scheme, read: Callable[[str], torch.Tensor], shape: tuple[int, int], name: str
    ) -> tuple[Scheme, bool]:
        """The scheme that a module's zero points and ``g_idx`` show, and whether its columns are reordered.

        Args:
            scheme: what the config says.
            read: suffix of ``PEEK`` -> the stored tensor.
            shape: ``(out, in)``.
            name: module name for errors.

        Raises:
            FormatError: as :meth:`decode`, for these tensors.
        """
        tensors = {suffix: read(suffix) for suffix in self.PEEK}
        fields.take(tensors, GROUPS, name, (torch.int32, torch.int64), (shape[1],))
        zero = self._zeros(tensors, scheme.bits, shape[0], scheme.groups(shape[1]), name)
        order = group_order(tensors[GROUPS], scheme.group(shape[1]), name)
        return replace(scheme, symmetric=bool((zero == scheme.implied_zero_point).all())), order is not None

    def _zeros(self, tensors: Mapping[str, torch.Tensor], bits: int, rows: int, groups: int, name: str) -> torch.Tensor:
        """uint8 ``[groups, out]``."""
        words = fields.take(tensors, ZEROS, name, (torch.int32,), (groups, word_count(rows, bits)))
        return unpack_codes(from_words(self._shift(words, bits, self.offset), rows, bits), bits, rows)

    @staticmethod
    def _shift(words: torch.Tensor, bits: int, offset: int) -> torch.Tensor:
        """Add ``offset`` to every code, word by word modulo 2**32."""
        if not offset:
            return words
        ones = sum(1 << shift for shift in range(0, 32, bits))
        return (words.to(torch.int64) + offset * ones).bitwise_and_(0xFFFFFFFF).to(torch.int32)

    def quantization_config(self, plan: Plan, *, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The ``quantization_config`` of config.json as transformers' GPTQConfig saves it.

        Columns are in their places (``desc_act`` false): a loaded checkpoint keeps its own config.

        Raises:
            FormatError: nothing is quantized, more than one scheme, a layer that the format cannot hold, or a choice of
                layers that the config cannot express.
        """
        scheme = one_scheme(plan, self.NAME, self.holds)
        prefix, chosen = _blocks(plan)
        return {
            "quant_method": METHOD,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "sym": scheme.symmetric,
            "desc_act": False,
            "checkpoint_format": self.NAME,
            "format": self.NAME,
            "block_name_to_quantize": None if prefix in _KNOWN_BLOCKS else prefix,
            "modules_in_block_to_quantize": chosen,
        }

    def read_config(self, config: Mapping[str, Any]) -> Resolver:
        """Parse a ``quantization_config``; raises FormatError for what hf-quant does not read, named."""
        stored = config.get("checkpoint_format") or config.get("format") or "gptq"
        if stored != self.NAME:
            raise FormatError(f"the checkpoint's format is {stored!r}, not {self.NAME}.", _OTHER)
        if config.get("dynamic"):
            raise FormatError("dynamic is set: layers differ in a way that only GPTQModel reads.", _OTHER)
        return Resolver(read_scheme(config, symmetric=bool(config.get("sym", True))), self.holds)

    def stock_loading(self, plan: Plan) -> str:
        """One sentence for the model card: what stock transformers needs to load this plan's checkpoint."""
        return "Stock transformers loads it with `pip install gptqmodel optimum` and no other argument."


class Resolver:
    """Module name -> Scheme; which modules are quantized, only the files tell."""

    def __init__(self, scheme: Scheme, holds: Holds) -> None:
        self._scheme = scheme
        self._holds = holds

    def __call__(
        self, name: str, in_features: int, out_features: int, kinds: tuple[str, ...] = ("Linear",)
    ) -> Scheme | None:
        """The scheme of a module that is packed; raises FormatError for one that hf-quant does not support."""
        reason = self._holds(self._scheme, kinds[0], (out_features, in_features))
        if reason is not None:
            raise FormatError(f"the config quantizes {name} as {self._scheme.label}, but {reason}.", _OTHER)
        return self._scheme


def read_scheme(config: Mapping[str, Any], *, symmetric: bool) -> Scheme:
    """Bits and group of a GPTQ or AWQ config.

    Raises:
        FormatError: other bits than 4 and 8, or a kernel asked for by name (they are the stock library's).
    """
    bits, group, backend = config.get("bits"), config.get("group_size", 128), config.get("backend")
    if bits not in (4, 8):
        raise FormatError(f"bits is {bits!r}; hf-quant reads 4 and 8.", _OTHER)
    if not isinstance(group, int) or isinstance(group, bool) or (group < 1 and group != PER_CHANNEL):
        raise FormatError(f"group_size is {group!r}.", _OTHER)
    if backend not in (None, "auto", "auto_trainable"):
        raise FormatError(f"backend={backend!r} asks for a kernel of GPTQModel.", _OTHER)
    return Scheme("int", int(bits), symmetric, group)


def zero_points(tensor: QuantizedTensor) -> torch.Tensor:
    """uint8 ``[out, groups]``, on the symmetric grid too."""
    if tensor.zero_point is not None:
        return tensor.zero_point
    return torch.full(tensor.scales().shape, tensor.scheme.implied_zero_point, dtype=torch.uint8, device=tensor.device)


def check_implied(zero: torch.Tensor, scheme: Scheme, name: str, suffix: str) -> None:
    """Raise FormatError unless all zero points are those of the symmetric grid."""
    if not bool((zero == scheme.implied_zero_point).all()):
        raise FormatError(
            f"{fields.label(name, suffix)} has zero points other than {scheme.implied_zero_point}, "
            f"but the scheme is {scheme.label}.",
            "the tensors belong to another checkpoint, or the file is damaged.",
        )


def group_order(index: torch.Tensor, group: int, name: str) -> torch.Tensor | None:
    """``g_idx`` -> int32 ``[in]``, the columns sorted by group; None when they are so already.

    Raises:
        FormatError: not every group has ``group`` columns.
    """
    columns = index.shape[0]
    counts = torch.bincount(index.clamp(min=0).long(), minlength=columns // group)
    if bool((index < 0).any()) or counts.shape[0] != columns // group or bool((counts != group).any()):
        raise FormatError(
            f"{fields.label(name, GROUPS)} does not put {group} columns into each of {columns // group} groups.", _OTHER
        )
    if bool((index[1:] >= index[:-1]).all()):
        return None
    return torch.argsort(index, stable=True).to(torch.int32)


def one_scheme(plan: Plan, format_name: str, holds: Holds) -> Scheme:
    """The scheme that all quantized layers share (asymmetric when any is); raises FormatError when they do not."""
    merged: Scheme | None = None
    first = ""
    for layer in plan.quantized:
        assert layer.scheme is not None
        reason = holds(layer.scheme, layer.kind, layer.shape)
        if reason is not None:
            raise FormatError(f"{layer.name} cannot be written: {reason}.", "leave it in float or use another format.")
        if merged is None:
            merged, first = layer.scheme, layer.name
        both = merged.symmetric and layer.scheme.symmetric
        if replace(layer.scheme, symmetric=both) != replace(merged, symmetric=both):
            raise FormatError(
                f"{layer.name} is {layer.scheme.label} and {first} is {merged.label}; {format_name} has one scheme for "
                "all layers.",
                "use compressed-tensors, which holds several.",
            )
        merged = replace(merged, symmetric=both)
    if merged is None:
        raise FormatError("the plan quantizes nothing.", "loosen skip and overrides.")
    return merged


def _blocks(plan: Plan) -> tuple[str, list[list[str]] | None]:
    """Where the blocks are, and which linear layers of a block are quantized (None: all)."""
    splits = check_in_blocks([layer.name for layer in plan.quantized])
    prefix, first = splits[0][0], plan.quantized[0].name
    for layer, (found, _) in zip(plan.quantized, splits, strict=True):
        if found != prefix:
            raise FormatError(
                f"{layer.name} and {first} belong to different stacks of blocks; a GPTQ config names one.",
                "leave one of them in float, or use compressed-tensors.",
            )
    leaves = list(dict.fromkeys(leaf for _, leaf in splits))
    inside = [q.name for q in plan.kept if q.kind in ("Linear", "Conv1D") and q.name.startswith(f"{prefix}.")]
    for name in inside:
        if any(name.endswith(leaf) for leaf in leaves):
            raise FormatError(
                f"{name} is left in float, and other layers of that name are quantized; "
                "a GPTQ config cannot tell blocks apart.",
                "use compressed-tensors, which can.",
            )
    return prefix, [leaves] if inside else None


def check_in_blocks(names: Sequence[str]) -> list[tuple[str, str]]:
    """(where its blocks are, its name in a block) of every layer; raises FormatError for one outside of the blocks."""
    splits = [_split(name) for name in names]
    for name, (prefix, leaf) in zip(names, splits, strict=True):
        if not prefix or any(part.isdecimal() for part in leaf.split(".")):
            where = "is one of several experts" if prefix else "is in no block"
            raise FormatError(
                f"{name} {where}; transformers reads GPTQ and AWQ in the linear layers of the blocks only.",
                "leave it in float, or use compressed-tensors.",
            )
    return splits


def _split(name: str) -> tuple[str, str]:
    """``model.layers.0.mlp.up_proj`` -> (``model.layers``, ``mlp.up_proj``); empty where there is no number."""
    parts = name.split(".")
    position = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[:position]), ".".join(parts[position + 1 :])


V1 = Gptq("gptq", 1)
V2 = Gptq("gptq_v2", 0)
