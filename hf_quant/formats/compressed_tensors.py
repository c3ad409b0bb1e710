"""compressed-tensors ``pack-quantized``: QuantizedTensor <-> the tensors of one module, Plan <-> its config.

One module on disk: ``weight_packed`` int32 ``[out, ceil(in*bits/32)]``, little-endian bit stream of unsigned codes (the
library writes "signed value + 2**(bits-1)", which is our canonical code); ``weight_scale`` ``[out, groups]``;
``weight_shape`` int64 ``[2]``; asymmetric adds ``weight_zero_point`` int32 ``[ceil(out*bits/32), groups]``, the same
bit stream of the same unsigned numbers along dim 0. Padding bits are zero.

What stock transformers (5.23, with compressed-tensors 0.20) loads; :func:`stock_loading` says it for a plan:

========================================  =============================  =====================================
checkpoint                                ``from_pretrained(dir)``       ``CompressedTensorsConfig(dequantize=True)``
========================================  =============================  =====================================
symmetric, one scheme                     yes                            yes
symmetric, several group sizes            yes, per module                no: it decodes all with the first group
symmetric, several bits                   yes, per module                **wrong weights, no error** (same reason)
asymmetric, one scheme                    no: packed zero points do not  yes
                                          fit the parameter it makes
asymmetric among several schemes          no                             no
a quantized embedding, one scheme         no: it wants to initialise it  yes, tied or not
a quantized embedding, several schemes    no                             no: it decodes all with the first scheme
experts, one symmetric scheme             yes, where its conversion      yes, likewise
                                          mapping merges experts
experts that it does not merge (GPT-OSS,  **random experts**, warned of  **random experts**, warned of
Granite), which are fused in float
experts, asymmetric                       no                             no
experts, several schemes                  **wrong weights, no error**    **wrong weights, no error**
========================================  =============================  =====================================

The default path casts ``weight_scale`` to the model's dtype and multiplies in it; ``dequantize=True`` multiplies in the
dtype of the stored scale and casts the weight. Stored scales in the model's dtype give the same weights either way.
GPT-2's ``Conv1D`` is not an ``nn.Linear``: compressed-tensors leaves it alone, so :func:`holds` refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from hf_quant.errors import FormatError
from hf_quant.formats import fields
from hf_quant.formats.matching import REGEX, compact, matches
from hf_quant.formats.words import from_words, to_words, word_count
from hf_quant.grids import PER_CHANNEL, Scheme
from hf_quant.tensor import QuantizedTensor, pack_codes, unpack_codes

if TYPE_CHECKING:
    from hf_quant.plan import Plan

NAME = "compressed-tensors"
STORAGE = "pack-quantized"
PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
SUFFIXES = (PACKED, SCALE, ZERO, SHAPE)
VERSION = 1  # of our marker in the config

_EXPERT = re.compile(r"\.experts\.\d+\.")
_PRESETS = {"W4A16": (4, True), "W8A16": (8, True), "W4A16_ASYM": (4, False)}
_STATIC_ORDERS = (None, False, "weight", "static")  # columns keep their places; the others need a g_idx
_NEVER_LINEAR = ("Embedding", "Norm", "Bias", "Experts", "Conv1D", "Parameter")  # no runtime reads them as Linear
OTHER = "load it with stock transformers, or with a runtime that supports it."


def suffixes(scheme: Scheme) -> tuple[str, ...]:
    """The tensors that a module of this scheme has on disk, besides its bias."""
    return (PACKED, SCALE, SHAPE) if scheme.symmetric else (PACKED, SCALE, ZERO, SHAPE)


def holds(scheme: Scheme, kind: str, shape: tuple[int, ...]) -> str | None:
    """Why this format cannot hold a layer; None when it can."""
    if scheme.grid != "int":
        return f"{NAME} {STORAGE} holds integers, not {scheme.grid}; use format bitsandbytes"
    if kind not in ("Linear", "Embedding"):
        return f"{NAME} quantizes nn.Linear and nn.Embedding, not {kind}"
    if len(shape) != 2:
        return f"{NAME} packs 2-D weights, not {list(shape)}"
    if shape[1] % scheme.group(shape[1]):
        return f"group_size={scheme.group(shape[1])} does not divide rows of {shape[1]}"
    return None


def encode(tensor: QuantizedTensor, *, dtype: torch.dtype | None = None, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of one module; ``weight_packed`` shares memory with ``tensor`` where rows fill whole int32 words.

    Args:
        tensor: on any device.
        dtype: the model's dtype; not used, as the scales keep the dtype that they were chosen in (give the quantizer
            the model's dtype: the stock loader casts scales to it).
        name: module name for errors.

    Raises:
        FormatError: a scheme that the format cannot hold.
    """
    reason = holds(tensor.scheme, "Linear", tensor.shape)
    if reason is None and tensor.order is not None:
        reason = f"its columns are reordered (GPTQ's act-order), which {NAME} does not read"
    if reason is not None:
        raise FormatError(f"{name or 'the weight'} cannot be written: {reason}.", "choose another scheme or format.")
    assert tensor.scale is not None  # int grids are never nested
    encoded = {
        PACKED: to_words(tensor.packed),
        SCALE: tensor.scale.contiguous(),
        SHAPE: torch.tensor(tensor.shape, dtype=torch.int64),
    }
    if tensor.zero_point is not None:
        by_column = pack_codes(tensor.zero_point.t().contiguous(), tensor.scheme.bits)
        encoded[ZERO] = to_words(by_column).t().contiguous()
    return encoded


def decode(tensors: Mapping[str, torch.Tensor], scheme: Scheme, *, name: str = "") -> QuantizedTensor:
    """The weight of one module; codes share memory with ``weight_packed`` where rows fill whole int32 words.

    Args:
        tensors: suffix (see ``SUFFIXES``) -> tensor, nothing else.
        scheme: what the config says about this module.
        name: module name for errors.

    Raises:
        FormatError: a tensor is missing, unknown, or not of the dtype or shape that the scheme implies.
    """
    fields.check_suffixes(tensors, SUFFIXES, name, NAME)
    sizes = fields.take(tensors, SHAPE, name, (torch.int64, torch.int32), (2,)).tolist()
    rows, columns = int(sizes[0]), int(sizes[1])
    reason = holds(scheme, "Linear", (rows, columns)) if min(rows, columns) > 0 else "it has no elements"
    if reason is not None:
        raise FormatError(f"{fields.label(name, SHAPE)} is {sizes}: {reason}.", "the config and the file disagree.")
    groups = scheme.groups(columns)
    words = fields.take(tensors, PACKED, name, (torch.int32,), (rows, word_count(columns, scheme.bits)))
    scale = fields.take(tensors, SCALE, name, fields.FLOATS, (rows, groups))
    fields.check_finite(scale, name, SCALE)
    packed = from_words(words, columns, scheme.bits)
    zero_point = None
    if not scheme.symmetric:
        zero_words = fields.take(tensors, ZERO, name, (torch.int32,), (word_count(rows, scheme.bits), groups))
        by_column = from_words(zero_words.t().contiguous(), rows, scheme.bits)
        zero_point = unpack_codes(by_column, scheme.bits, rows).t().contiguous()
    elif ZERO in tensors:
        raise FormatError(
            f"{fields.label(name, ZERO)} is there, but the scheme is {scheme.label}.",
            "the config and the file disagree.",
        )
    return QuantizedTensor(packed, scale.contiguous(), zero_point, scheme, (rows, columns))


def quantization_config(plan: Plan, *, dtype: torch.dtype | None = None, storage: str = STORAGE) -> dict[str, Any]:
    """The ``quantization_config`` of config.json for stock transformers, vLLM and compressed-tensors.

    One scheme: a single group that targets ``Linear``. Several: one group each, with names or patterns that match no
    other layer. ``ignore`` names every module that stays in float and that a runtime might take for a linear layer
    (vLLM builds routers as linear layers, for one). Modules that have another name in the files are named twice:
    transformers looks for the model's name, vLLM for that of the files.

    Raises:
        FormatError: nothing is quantized, or a layer that the format cannot hold.
    """
    members: dict[Scheme, list[str]] = {}
    for layer in plan.quantized:
        assert layer.scheme is not None
        reason = holds(layer.scheme, layer.kind, layer.shape)
        if reason is not None:
            raise FormatError(f"{layer.name} cannot be written: {reason}.", "leave it in float or use another grid.")
        members.setdefault(layer.scheme, []).append(layer.name)
    if not members:
        raise FormatError("the plan quantizes nothing.", "loosen skip and overrides.")
    universe = {layer.name for layer in plan.layers} | set(plan.stored_names.values())

    def named(layers: Iterable[str]) -> list[str]:
        own = list(layers)
        return compact([*own, *(plan.stored_names[name] for name in own if name in plan.stored_names)], universe)

    ordered = sorted(members, key=lambda scheme: -len(members[scheme]))
    targets = {scheme: named(members[scheme]) for scheme in ordered}
    if len(ordered) == 1:
        # by name, too: embeddings, as others stay in float, and what is in no block, as vLLM's head is no linear layer
        alone = [q.name for q in plan.quantized if q.kind == "Embedding" or not re.search(r"\.\d+\.", q.name)]
        targets = {ordered[0]: ["Linear", *named(alone)]}
    groups = {
        f"group_{index}": {
            "targets": targets[scheme],
            "weights": _weights(scheme),
            "input_activations": None,
            "output_activations": None,
        }
        for index, scheme in enumerate(ordered)
    }
    return {
        "quant_method": NAME,
        "format": storage,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": named(q.name for q in plan.kept if len(q.shape) == 2 and q.kind not in _NEVER_LINEAR),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "hf_quant": {"version": VERSION},
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    channel = scheme.group_size == PER_CHANNEL
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }


def stock_loading(plan: Plan) -> str:
    """One sentence for the model card: what stock transformers needs to load this plan's checkpoint."""
    if plan.experts:
        experts = {q.scheme for q in plan.layers if len(q.shape) == 2 and _EXPERT.search(q.name)}
        one = len(experts) == 1 and all(scheme is not None and scheme.symmetric for scheme in experts)
        if plan.experts == "apart" or not one:
            # the loader takes all experts that it merges for packed ones of the same scheme
            why = {"apart": "stored one by one", "float": "in float beside packed layers"}.get(plan.experts)
            return (
                f"Stock transformers cannot load the experts of {plan.model_type} "
                f"{why or 'unless all have one symmetric scheme'} (they come out "
                "wrong or not at all): `import hf_quant` before `from_pretrained(...)`."
            )
    schemes = {layer.scheme for layer in plan.quantized if layer.scheme is not None}
    install = "Stock transformers loads it with `pip install compressed-tensors`"
    table = next((layer.name for layer in plan.quantized if layer.kind == "Embedding"), None)
    if plan.packed == "nothing":
        return (
            f"Stock transformers cannot load packed {plan.model_type} weights, as it splits some: "
            "`import hf_quant` before `from_pretrained(...)`."
        )
    if plan.packed and len(schemes) > 1:
        return (
            f"Stock transformers cannot load {plan.model_type} weights of several schemes (its code reads weights "
            "while they are packed): `import hf_quant` before `from_pretrained(...)`."
        )
    if table is not None and len(schemes) > 1:
        return (
            f"Stock transformers cannot load {table} beside layers of another scheme: "
            "`import hf_quant` before `from_pretrained(...)`."
        )
    if len(schemes) > 1 and not all(scheme.symmetric for scheme in schemes):
        return (
            "Stock transformers cannot load a mix of schemes with zero points: "
            "`import hf_quant` before `from_pretrained(...)`."
        )
    if len(schemes) > 1:
        return (
            f"{install} and no other argument; do not pass `dequantize=True`, "
            "which would decode every layer as if it had the first scheme."
        )
    if table is None and not plan.packed and all(scheme.symmetric for scheme in schemes):
        return f"{install} and no other argument."
    return f"{install} and `from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True))`."


class Resolver:
    """Module name -> Scheme or None, by compressed-tensors' matching rules; see :func:`read_config`."""

    def __init__(self, targets: Mapping[str, Scheme], ignore: tuple[str, ...]) -> None:
        # the library's order: whole names, then patterns in alphabetical order, then class names
        self._targets = dict(sorted(targets.items(), key=lambda item: (REGEX in item[0], item[0])))
        self._ignore = ignore

    def __call__(
        self, name: str, in_features: int, out_features: int, kinds: tuple[str, ...] = ("Linear",)
    ) -> Scheme | None:
        """The scheme of a module, or None when it is stored in float.

        Args:
            name: module name as in ``model.named_modules()``.
            in_features: row length of the weight.
            out_features: rows of the weight.
            kinds: names of the module's class and its bases. Ask for embeddings and subclasses of Linear too: the
                library can quantize them and hf-quant cannot.

        Raises:
            FormatError: the config quantizes this module in a way that hf-quant does not support.
        """
        classes = (*kinds, "Module")
        if any(matches(target, name) or target in classes for target in self._ignore):
            return None
        scheme = next((found for target, found in self._targets.items() if matches(target, name)), None)
        if scheme is None:
            scheme = next((found for target, found in self._targets.items() if target in classes), None)
        if scheme is None or not {"Linear", "Embedding"} & set(kinds):
            return None
        reason = holds(scheme, kinds[0], (out_features, in_features))
        if reason is not None:
            raise FormatError(f"the config quantizes {name} as {scheme.label}, but {reason}.", OTHER)
        return scheme


def read_config(config: Mapping[str, Any], *, storage: str = STORAGE) -> Resolver:
    """Parse a ``quantization_config``, ours or anyone's.

    Args:
        config: as in config.json.
        storage: how the weights must be stored.

    Raises:
        FormatError: not compressed-tensors, malformed, or something that hf-quant does not read, named: quantized
            activations or caches, floating-point codes, other bit widths, per-tensor or block scales, reordered
            columns, other formats, transforms, sparsity.
    """
    if config.get("quant_method") != NAME:
        raise FormatError(
            f"quant_method is {config.get('quant_method')!r}, not {NAME}.", "use the reader of that format."
        )
    if config.get("quantization_status") != "compressed":
        raise FormatError(
            f"quantization_status is {config.get('quantization_status')!r}: the weights are not packed.", OTHER
        )
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
        if config.get(key):
            raise FormatError(f"{key} is set, which hf-quant does not support.", OTHER)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise FormatError("config_groups is empty or not a mapping.", "the config is damaged.")
    targets: dict[str, Scheme] = {}
    for key, group in groups.items():
        names, scheme = _read_group(str(key), group, config.get("format"), storage)
        targets.update(dict.fromkeys(names, scheme))
    ignore = config.get("ignore") or []
    if not _is_names(ignore):
        raise FormatError("ignore is not a list of names.", "the config is damaged.")
    return Resolver(targets, tuple(ignore))


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _read_group(key: str, group: object, config_format: object, storage: str) -> tuple[list[str], Scheme]:
    where = f"config_groups[{key!r}]"
    if isinstance(group, (list, tuple)) and key.upper() in _PRESETS:
        bits, symmetric = _PRESETS[key.upper()]
        weights = {"num_bits": bits, "symmetric": symmetric, "group_size": 128}
        group = {"targets": group, "weights": weights}
    if not isinstance(group, Mapping):
        raise FormatError(f"{where} is not a scheme that hf-quant reads.", OTHER)
    names = group.get("targets")
    if not _is_names(names) or not names:
        raise FormatError(f"{where} has no list of targets.", "the config is damaged.")
    stored = group.get("format") or config_format
    if stored != storage:
        raise FormatError(f"{where} is stored as {stored!r}, expected {storage}.", OTHER)
    for part in ("input_activations", "output_activations"):
        if group.get(part) is not None:
            raise FormatError(f"{where} quantizes {part}; hf-quant reads weight-only schemes.", OTHER)
    return list(names), _read_weights(group.get("weights"), where)


def _read_weights(weights: object, where: str) -> Scheme:
    if not isinstance(weights, Mapping):
        raise FormatError(f"{where} has no weights.", OTHER)
    bits, size = weights.get("num_bits", 8), weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    refused = {
        "type": weights.get("type", "int") != "int",
        "num_bits": bits not in (4, 8),
        "strategy": strategy not in ("group", "channel"),
        "group_size": strategy == "group" and (not isinstance(size, int) or isinstance(size, bool) or size < 1),
        "dynamic": bool(weights.get("dynamic")),
        "actorder": weights.get("actorder") not in _STATIC_ORDERS,
        "symmetric": not isinstance(weights.get("symmetric", True), bool),
    }
    for key, is_refused in refused.items():
        if is_refused:
            value = strategy if key == "strategy" else weights.get(key)
            raise FormatError(f"{where} weights: {key}={value!r} is not supported by hf-quant.", OTHER)
    group = PER_CHANNEL if strategy == "channel" else int(size or 0)
    return Scheme(bits=bits, symmetric=weights.get("symmetric", True), group_size=group)
