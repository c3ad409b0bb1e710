"""AWQ in its ``gemm`` layout: QuantizedTensor <-> the tensors of one module, Plan <-> its config.

One module on disk, as AutoAWQ introduced it (codes are unsigned, value = (code - zero) * scale):

* ``qweight`` int32 ``[in, out/8]``: eight output columns of one input row in a word; the nibbles, from the lowest, hold
  columns 0, 2, 4, 6, 1, 3, 5, 7 of the eight (the order that its CUDA kernel unpacks without shuffling);
* ``qzeros`` int32 ``[groups, out/8]``: the zero points, packed alike;
* ``scales`` float16 ``[groups, out]``.

Only 4 bits. There are no other column orders. A weight on the symmetric grid has zero points of 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from hf_quant.errors import FormatError
from hf_quant.formats import fields, gptq
from hf_quant.formats.matching import skip_keys
from hf_quant.formats.words import from_words, to_words
from hf_quant.grids import Scheme
from hf_quant.tensor import QuantizedTensor, pack_codes, unpack_codes

if TYPE_CHECKING:
    from hf_quant.plan import Plan

NAME = "awq"
WEIGHT, ZEROS, SCALE = gptq.WEIGHT, gptq.ZEROS, gptq.SCALE
SUFFIXES = (WEIGHT, ZEROS, SCALE)
PEEK = (ZEROS,)  # the scheme depends on what they hold
BITS = 4
PER_WORD = 32 // BITS
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(_ORDER.index(column) for column in range(PER_WORD))
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_OTHER = "load it with stock transformers and gptqmodel."


def suffixes(scheme: Scheme) -> tuple[str, ...]:
    """The tensors that a module has on disk, besides its bias."""
    return SUFFIXES


def holds(scheme: Scheme, kind: str, shape: tuple[int, ...]) -> str | None:
    """Why this format cannot hold a layer; None when it can."""
    if scheme.grid != "int" or scheme.bits != BITS:
        return f"{NAME} holds int{BITS}, not {scheme.label}"
    if kind != "Linear":
        return f"{NAME} quantizes nn.Linear, not {kind}"
    if len(shape) != 2:
        return f"{NAME} packs 2-D weights, not {list(shape)}"
    if shape[1] % scheme.group(shape[1]):
        return f"group_size={scheme.group(shape[1])} does not divide rows of {shape[1]}"
    if shape[0] % PER_WORD:
        return f"{NAME} packs {PER_WORD} output columns into a word, which does not divide {shape[0]}"
    return None


def encode(tensor: QuantizedTensor, *, dtype: torch.dtype, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of one module; raises FormatError for what the format cannot hold."""
    reason = holds(tensor.scheme, "Linear", tensor.shape)
    if reason is None and tensor.order is not None:
        reason = f"its columns are reordered (GPTQ's act-order), which {NAME} cannot express"
    if reason is not None:
        raise FormatError(f"{name or 'the weight'} cannot be written: {reason}.", "choose another scheme or format.")
    return {
        WEIGHT: _pack(tensor.codes().t()),
        ZEROS: _pack(gptq.zero_points(tensor).t()),
        SCALE: tensor.scales().t().contiguous(),
    }


def decode(tensors: Mapping[str, torch.Tensor], scheme: Scheme, *, name: str = "") -> QuantizedTensor:
    """The weight ``[out, in]`` of one module.

    Args:
        tensors: suffix (see ``SUFFIXES``) -> tensor, nothing else.
        scheme: symmetric only where every zero point is 8 (see :func:`refine`).
        name: module name for errors.

    Raises:
        FormatError: a tensor is missing, unknown, damaged, or not what the scheme says.
    """
    fields.check_suffixes(tensors, SUFFIXES, name, NAME)
    words = fields.take(tensors, WEIGHT, name, (torch.int32,), (None, None))
    rows, columns = int(words.shape[1]) * PER_WORD, int(words.shape[0])
    reason = holds(scheme, "Linear", (rows, columns))
    if reason is not None:
        raise FormatError(f"{fields.label(name, WEIGHT)}: {reason}.", _OTHER)
    scale = fields.take(tensors, SCALE, name, _SCALES, (scheme.groups(columns), rows))
    fields.check_finite(scale, name, SCALE)
    zero_point = _zeros(tensors, scheme, (rows, columns), name).t().contiguous()
    if scheme.symmetric:
        gptq.check_implied(zero_point, scheme, name, ZEROS)
    packed = pack_codes(_unpack(words).t().contiguous(), BITS)
    zeros = None if scheme.symmetric else zero_point
    return QuantizedTensor(packed, scale.t().contiguous(), zeros, scheme, (rows, columns))


def refine(
    scheme: Scheme, read: Callable[[str], torch.Tensor], shape: tuple[int, int], name: str
) -> tuple[Scheme, bool]:
    """The scheme that a module's zero points show; see :meth:`hf_quant.formats.gptq.Gptq.refine`."""
    zero = _zeros({ZEROS: read(ZEROS)}, scheme, shape, name)
    return replace(scheme, symmetric=bool((zero == scheme.implied_zero_point).all())), False


def quantization_config(plan: Plan, *, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The ``quantization_config`` of config.json as transformers' AwqConfig saves it.

    Raises:
        FormatError: nothing is quantized, more than one scheme, or a layer that the format cannot hold.
    """
    scheme = gptq.one_scheme(plan, NAME, holds)
    quantized = [layer.name for layer in plan.quantized]
    gptq.check_in_blocks(quantized)  # transformers never replaces the output head
    floats = [layer.name for layer in plan.kept if layer.kind == "Linear"]
    return {
        "quant_method": NAME,
        "bits": BITS,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": skip_keys(floats, quantized) or None,
    }


def read_config(config: Mapping[str, Any]) -> gptq.Resolver:
    """Parse a ``quantization_config``; raises FormatError for what hf-quant does not read, named."""
    layout = str(config.get("version") or config.get("format") or "gemm").lower()
    if layout != "gemm":
        raise FormatError(f"the checkpoint's layout is {layout!r}; hf-quant reads AWQ's gemm.", _OTHER)
    if config.get("bits", BITS) != BITS:
        raise FormatError(f"bits is {config.get('bits')!r}; hf-quant reads AWQ of {BITS} bits.", _OTHER)
    scheme = gptq.read_scheme({"bits": BITS, **config}, symmetric=not config.get("zero_point", True))
    return gptq.Resolver(scheme, holds)


def stock_loading(plan: Plan) -> str:
    """One sentence for the model card: what stock transformers needs to load this plan's checkpoint."""
    return "Stock transformers loads it with `pip install gptqmodel` and no other argument."


def _zeros(tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> torch.Tensor:
    """uint8 ``[groups, out]``."""
    expected = (scheme.groups(shape[1]), shape[0] // PER_WORD)
    return _unpack(fields.take(tensors, ZEROS, name, (torch.int32,), expected))


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 ``[n, out]`` -> int32 ``[n, out/8]``."""
    eights = codes.reshape(codes.shape[0], -1, PER_WORD)[..., list(_ORDER)]
    return to_words(pack_codes(eights.reshape(codes.shape[0], -1), BITS))


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_pack`."""
    count = words.shape[1] * PER_WORD
    stored = unpack_codes(from_words(words.contiguous(), count, BITS), BITS, count)
    return stored.reshape(words.shape[0], -1, PER_WORD)[..., list(_INVERSE)].reshape(words.shape[0], count)
