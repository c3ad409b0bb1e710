"""The menu of a budget: every way to store each linear layer, with its bits and bytes as the plan counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_quant.config import LEAVE_IN_FLOAT, HfQuantConfig
from hf_quant.errors import BudgetError
from hf_quant.grids import PER_CHANNEL, Scheme
from hf_quant.plan import Plan, PlannedLayer, make_plan

FLOAT_LABEL = "float"
FLOAT_BITS = 16  # what a weight left in float counts in an average of bits, whatever dtype the model is in
FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
)
_INT_GROUPS = {4: (32, 64, 128, 256, PER_CHANNEL), 8: (64, PER_CHANNEL)}
_TABLE_GROUPS = (32, 64, 128, 256)
# One tensor in a safetensors header: its longest suffix, the keys and punctuation, two sizes and two offsets.
_HEADER_ENTRY = 36 + 52 + 2 * 11 + 2 * 13
_HEADER_FIXED = 128  # the length, the metadata and the padding


@dataclass(frozen=True)
class Choice:
    """One way to store one layer.

    Attributes:
        scheme: None leaves the layer in float.
        bits: of codes, scales and zero points together (not per weight); 16 a weight in float.
        nbytes: in the checkpoint, with the layer's entries in the file's header.
    """

    scheme: Scheme | None
    bits: float
    nbytes: int

    @property
    def label(self) -> str:
        return self.scheme.label if self.scheme else FLOAT_LABEL


@dataclass(frozen=True)
class LayerMenu:
    """The choices of one layer, cheapest in bits first.

    Attributes:
        name: module name.
        kind: ``Linear`` or ``Conv1D``.
        shape: ``(out, in)``.
        choices: at least one; only one when the user's own overrides say how the layer is stored.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    choices: tuple[Choice, ...]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def choice(self, scheme: Scheme | None) -> Choice:
        """The choice with this scheme (one that the layer has)."""
        return next(choice for choice in self.choices if choice.scheme == scheme)


@dataclass(frozen=True)
class Menu:
    """Every layer that a budget decides about, and the bytes of everything else.

    Attributes:
        layers: in the model's order.
        together: names of layers that must be stored the same way; every layer is in exactly one of these sets.
        rest_bytes: of the checkpoint's other tensors (embeddings, norms, biases, heads), headers included.
        float_bytes: of the whole model in float, headers included.
    """

    layers: tuple[LayerMenu, ...]
    together: tuple[tuple[str, ...], ...]
    rest_bytes: int
    float_bytes: int

    @property
    def numel(self) -> int:
        return sum(layer.numel for layer in self.layers)

    def layer(self, name: str) -> LayerMenu:
        return next(layer for layer in self.layers if layer.name == name)


def default_schemes(config: HfQuantConfig) -> tuple[Scheme | None, ...]:
    """What a budget chooses from: schemes that the config's format holds side by side and that stock runtimes load.

    On the int grid int4 and int8 in several groups; on nf4 and fp4, whose format holds no int8, several block sizes;
    and float.

    Raises:
        BudgetError: the config wants zero points: stock transformers loads no mix of schemes that have them.
    """
    if not config.symmetric:
        raise BudgetError(
            "a budget mixes schemes, and stock transformers loads no mix of schemes with zero points.",
            "drop symmetric=False, or quantize without a budget.",
        )
    if config.grid != "int":
        table = Scheme(config.grid, 4, True, _TABLE_GROUPS[0], config.double_quant)
        return (*(replace(table, group_size=group) for group in _TABLE_GROUPS), None)
    return (*(Scheme("int", bits, True, group) for bits, groups in _INT_GROUPS.items() for group in groups), None)


def make_menu(
    model: nn.Module,
    config: HfQuantConfig,
    schemes: Sequence[Scheme | None] | None = None,
    together: Sequence[Sequence[str]] = FUSED,
) -> Menu:
    """The menu of ``model`` (which may be on the meta device): what ``config`` quantizes may be stored in any scheme.

    Groups that do not divide a row are fitted as the plan fits them, and choices that then are the same count once.
    Layers that ``config`` skips stay in float and outside the average; layers that its overrides name stay as they say.

    Args:
        model: the float model or its skeleton.
        config: grid, skips, overrides and scale dtype.
        schemes: what to choose from (None in it is float); default :func:`default_schemes`.
        together: endings of names that must share one choice within their parent, because runtimes fuse them into one
            matrix. A layer that an override names is not bound by them.

    Raises:
        PlanError: as :func:`hf_quant.plan.make_plan`.
        BudgetError: no scheme to choose from.
    """
    wanted = tuple(default_schemes(config) if schemes is None else schemes)
    if not any(wanted):
        raise BudgetError("a budget has no scheme to choose from.", "give at least one besides float.")
    base = make_plan(model, config)
    pinned = {layer.name for layer in base.quantized if layer.rule.startswith("override")}
    free = [layer for layer in base.quantized if layer.name not in pinned]
    found: dict[str, dict[Scheme | None, Choice]] = {layer.name: {} for layer in base.quantized}
    for layer in base.quantized:
        if layer.name in pinned:
            found[layer.name][layer.scheme] = _choice(layer, base)
    for scheme in wanted:
        if scheme is None:
            for layer in free:
                size = layer.float_bytes + _header(layer.name, 1)
                found[layer.name][None] = Choice(None, float(FLOAT_BITS * layer.numel), size)
            continue
        chosen = {layer.name: override(scheme) for layer in free}
        planned = make_plan(model, _changed(config, chosen, on_indivisible="nearest"))
        for layer in planned.quantized:
            if layer.name not in pinned and layer.scheme is not None and not _is_listed(layer, found[layer.name]):
                found[layer.name][layer.scheme] = _choice(layer, planned)
    bare = [layer.name for layer in free if not found[layer.name]]
    if bare:
        raise BudgetError(f"no scheme of the budget fits {bare[0]}.", "allow float, or skip the layer.")
    layers = tuple(
        LayerMenu(
            layer.name,
            layer.kind,
            (layer.shape[0], layer.shape[1]),
            tuple(sorted(found[layer.name].values(), key=lambda choice: (choice.bits, choice.nbytes))),
        )
        for layer in base.quantized
    )
    rest = sum(layer.float_bytes + _header(layer.name, 1) for layer in base.kept)
    floats = sum(layer.float_bytes + _header(layer.name, 1) for layer in base.quantized)
    return Menu(layers, _bound(layers, pinned, together), rest + _HEADER_FIXED, rest + floats + _HEADER_FIXED)


def override(scheme: Scheme | None) -> dict[str, Any] | str:
    """What a scheme is called in ``HfQuantConfig.overrides``; every key is said, so no default can change it."""
    if scheme is None:
        return LEAVE_IN_FLOAT
    value: dict[str, Any] = {"bits": scheme.bits, "grid": scheme.grid, "group_size": scheme.group_size}
    return value | ({"symmetric": scheme.symmetric} if scheme.grid == "int" else {"double_quant": scheme.double_quant})


def apply_overrides(config: HfQuantConfig, overrides: Mapping[str, Mapping[str, Any] | str]) -> HfQuantConfig:
    """The config with these overrides added to its own (an exact name wins over the config's patterns)."""
    return _changed(config, overrides)


def _changed(config: HfQuantConfig, overrides: Mapping[str, Any], **more: Any) -> HfQuantConfig:
    # what the config names itself keeps its place: the first matching pattern decides
    return HfQuantConfig(**{**config.to_dict(), "overrides": {**config.overrides, **overrides}, **more})


def _is_listed(layer: PlannedLayer, found: Mapping[Scheme | None, Choice]) -> bool:
    """Whether a choice stores the layer the same way, if by another name (a group as long as the row)."""

    def meaning(scheme: Scheme | None) -> Scheme | None:
        return scheme and replace(scheme, group_size=scheme.group(layer.shape[1]))

    return meaning(layer.scheme) in {meaning(scheme) for scheme in found}


def _choice(layer: PlannedLayer, plan: Plan) -> Choice:
    assert layer.scheme is not None
    scale_bits = 8 * getattr(torch, plan.scale_dtype).itemsize
    bits = layer.scheme.bits_per_weight(layer.shape[1], scale_bits) * layer.numel
    tensors = 3 if layer.scheme.grid == "int" else 4
    tensors += not layer.scheme.symmetric
    tensors += 2 * layer.scheme.double_quant
    return Choice(layer.scheme, bits, layer.planned_bytes + _header(layer.name, tensors))


def _header(name: str, tensors: int) -> int:
    """At most so many bytes of a safetensors header describe a layer's tensors."""
    return tensors * (len(name) + _HEADER_ENTRY)


def _bound(
    layers: Sequence[LayerMenu], pinned: set[str], together: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], ...]:
    """Sets of layers that share one choice: the same parent, leaves of one set, and the same choices to offer."""
    sets: dict[object, list[str]] = {}
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        family = next((tuple(family) for family in together if leaf in family), None)
        if family is None or layer.name in pinned:
            key: object = layer.name
        else:
            key = (parent, family, frozenset(choice.scheme for choice in layer.choices))
        sets.setdefault(key, []).append(layer.name)
    return tuple(tuple(names) for names in sets.values())
