"""Model skeleton + config -> Plan: per module the scheme and its bytes, or why it stays in float."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_quant.config import CALIBRATED, HfQuantConfig
from hf_quant.errors import PlanError
from hf_quant.grids import PER_CHANNEL, Scheme
from hf_quant.nn.embedding import is_embedding
from hf_quant.nn.splitting import expanded_modules, left_fused, stock_experts
from hf_quant.plan_bytes import planned_bytes
from hf_quant.plan_rules import Rules, is_linear
from hf_quant.plan_stock import names_in_files, stock_packed

EMBEDDING = "Embedding"
_STORED = "as the checkpoint has it"
SMALLEST_NEAREST_GROUP = 16
TABLE_GROUPS = (32, 4096)  # smallest and largest block of bitsandbytes' 4-bit kernels; powers of two only


@dataclass(frozen=True)
class PlannedLayer:
    """What happens to one weight.

    Attributes:
        name: module name (``model.layers.0.self_attn.q_proj``); a bare parameter has its own name.
        kind: ``Linear``, ``Conv1D``, ``Embedding``, ``Norm``, ``Parameter`` ...
        shape: ``(out, in)`` for linears, the parameter's shape otherwise.
        scheme: how it is quantized; None when it stays in float.
        method: the algorithm that chooses scales and codes; empty when it stays in float.
        rule: which rule decided (``default``, ``override 're:.*mlp.*'``, ``skip 'lm_head'``).
        note: why it stays in float, or why its group is not the one asked for; else empty.
        float_bytes: bytes in the float checkpoint.
        planned_bytes: bytes after quantization.
        untied_from: what a quantized weight is tied to in the float model (and what stays in float), else empty.
        shares: the embedding whose packed table this layer computes with, else empty.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    method: str
    rule: str
    note: str
    float_bytes: int
    planned_bytes: int
    untied_from: str = ""
    shares: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """Every weight of a model and what happens to it.

    What stock transformers can do with it: ``experts`` as :func:`hf_quant.nn.splitting.stock_experts` says it,
    ``packed`` as :func:`hf_quant.plan_stock.stock_packed`. ``stored_names`` are the modules that have another name in
    files (:func:`hf_quant.plan_stock.names_in_files`).
    """

    architecture: str
    model_type: str
    format: str
    scale_dtype: str
    layers: tuple[PlannedLayer, ...]
    experts: str = ""
    packed: str = ""
    stored_names: Mapping[str, str] = field(default_factory=dict, hash=False)

    @cached_property
    def quantized(self) -> tuple[PlannedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.scheme is not None)

    @cached_property
    def kept(self) -> tuple[PlannedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.scheme is None)

    @property
    def shares(self) -> dict[str, str]:
        """Layers without a weight of their own -> the embeddings whose packed tables they compute with."""
        return {layer.name: layer.shares for layer in self.layers if layer.shares}

    @cached_property
    def calibrated(self) -> Plan:
        """This plan without what is quantized without data whatever the method: embeddings."""
        left = (replace(q, scheme=None, method="") if q.kind == EMBEDDING else q for q in self.layers)
        return replace(self, layers=tuple(left))

    @property
    def float_bytes(self) -> int:
        return sum(layer.float_bytes for layer in self.layers)

    @property
    def planned_bytes(self) -> int:
        return sum(layer.planned_bytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Codes, scales and zero points over the quantized linears only."""
        scale_bits = 8 * getattr(torch, self.scale_dtype).itemsize
        total = sum(q.scheme.bits_per_weight(q.shape[1], scale_bits) * q.numel for q in self.quantized if q.scheme)
        return total / max(1, sum(layer.numel for layer in self.quantized))

    @property
    def peak_bytes(self) -> int:
        """Anonymous memory of quantize-on-load: the quantized model, and the float weight in hand with its work space.

        The work space of one weight is its float copy, its float32 view and its codes (measured by
        ``scripts/bench_memory.py``).
        """
        work = max((layer.float_bytes + 5 * layer.numel for layer in self.quantized), default=0)
        return self.planned_bytes + work

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of a module by its name; None when it stays in float or is not in the plan."""
        return self._schemes.get(name)

    def layer(self, name: str) -> PlannedLayer:
        """The row of a weight by its name; raises KeyError when there is none."""
        return self._named[name]

    @cached_property
    def _named(self) -> dict[str, PlannedLayer]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def _schemes(self) -> dict[str, Scheme]:
        return {layer.name: layer.scheme for layer in self.quantized if layer.scheme}


def make_plan(model: nn.Module, config: HfQuantConfig) -> Plan:
    """Decide, for every weight of ``model`` (which may be on the meta device), how it is quantized or why not.

    Fused experts are planned as the linear layers that they are taken apart into (:mod:`hf_quant.nn.splitting`).

    Raises:
        PlanError: a pattern that matches nothing, contradictory requests, a group that does not divide (by option), or
            nothing left to quantize.
    """
    modules = dict(expanded_modules(model))
    linears = {name: module for name, module in modules.items() if name and is_linear(module)}
    rules = Rules(model, config, modules, list(linears))
    tied = _tied(model)
    tables = _plan_tables(modules, rules, tied)
    layers: list[PlannedLayer] = []
    for name, module in modules.items():
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}" if name else leaf
            if leaf == "weight" and name in tables:
                layers.append(tables[name])
            elif leaf == "weight" and name in linears:
                layers.append(_plan_linear(name, linears[name], rules, tied))
            else:
                layers.append(_plan_other(full, leaf, module, parameter, tied))
    format_name = "compressed-tensors" if config.grid == "int" else "bitsandbytes"
    plan = _plan(model, format_name, resolve_scale_dtype(config, _model_dtype(model)), layers)
    if not plan.quantized:
        raise PlanError(
            f"nothing to quantize in {plan.architecture}: {len(linears)} linear layers, all left in float.",
            "loosen skip / overrides, or check that this is the model you meant.",
        )
    return plan


def plan_of_checkpoint(model: nn.Module, schemes: Mapping[str, Scheme], format_name: str, scale_dtype: str) -> Plan:
    """The plan that a quantized checkpoint was made by, as far as its files tell: what is quantized, and how.

    Args:
        model: its float skeleton.
        schemes: module name -> scheme of what is quantized.
        format_name: a key of :data:`hf_quant.formats.FORMATS`.
        scale_dtype: of the stored scales.
    """
    tied = _tied(model)
    layers: list[PlannedLayer] = []
    for name, module in expanded_modules(model):
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}" if name else leaf
            owner = tied.get(full, "").removesuffix(".weight")
            if leaf == "weight" and is_embedding(module) and name in schemes:
                layers.append(replace(_float_table(name, parameter), scheme=schemes[name], rule=_STORED))
                continue
            if leaf == "weight" and is_linear(module) and owner in schemes and name not in schemes:
                layers.append(_shared(_float_linear(name, module), owner, _STORED))
                continue
            if leaf != "weight" or not is_linear(module):
                layers.append(_plan_other(full, leaf, module, parameter, tied))
                continue
            layer, scheme = _float_linear(name, module), schemes.get(name)
            note = "" if scheme else "stored in float"
            layers.append(replace(layer, scheme=scheme, rule=_STORED, note=note))
    return _plan(model, format_name, scale_dtype, layers)


def resolve_scale_dtype(config: HfQuantConfig, model_dtype: torch.dtype) -> str:
    """``auto``: float16 for float16 models, else bfloat16."""
    if config.scale_dtype != "auto":
        return config.scale_dtype
    return "float16" if model_dtype == torch.float16 else "bfloat16"


def _tied(model: nn.Module) -> dict[str, str]:
    """Parameter name -> the parameter that it shares its data with, where the model says so."""
    tied = getattr(model, "all_tied_weights_keys", None)
    return dict(tied) if isinstance(tied, dict) else {}


def _float_linear(name: str, module: nn.Module) -> PlannedLayer:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    kind = "Conv1D" if type(module) is Conv1D else "Linear"
    rows, columns = (weight.shape[1], weight.shape[0]) if kind == "Conv1D" else (weight.shape[0], weight.shape[1])
    return PlannedLayer(name, kind, (rows, columns), None, "", "", "", weight.numel() * weight.element_size(), 0)


def _plan_linear(name: str, module: nn.Module, rules: Rules, tied: dict[str, str]) -> PlannedLayer:
    layer = _float_linear(name, module)
    columns = layer.shape[1]
    partner = tied.get(f"{name}.weight") or next((k for k, v in tied.items() if v == f"{name}.weight"), None)
    request, rule, note = rules.decide(name)
    if partner is not None:
        shared = 0 if f"{name}.weight" in tied else layer.float_bytes
        layer = replace(layer, float_bytes=shared)
        if name not in rules.config.overrides or request is None:
            return replace(layer, rule="default skip", note=f"tied to {partner}")
        if shared:
            raise PlanError(f"{name} cannot be quantized: {partner} is tied to its weight.", "drop the override.")
        layer = replace(layer, untied_from=partner)
    if request is None:
        return replace(layer, rule=rule, note=note)
    scheme, note = fit_group(request.scheme, columns, name, rules.config.on_indivisible)
    if scheme is None:
        return replace(layer, rule=rule, note=note)
    if layer.untied_from:
        note = "; ".join(filter(None, (note, f"untied from {layer.untied_from}, which stays in float")))
    return replace(layer, scheme=scheme, method=request.method, rule=rule, note=note)


def _float_table(name: str, weight: torch.Tensor) -> PlannedLayer:
    shape, nbytes = (weight.shape[0], weight.shape[1]), weight.numel() * weight.element_size()
    return PlannedLayer(name, EMBEDDING, shape, None, "", "", "", nbytes, 0)


def _shared(layer: PlannedLayer, table: str, rule: str) -> PlannedLayer:
    return replace(layer, rule=rule, note=f"computes with the packed table of {table}", float_bytes=0, shares=table)


def _plan_tables(modules: Mapping[str, nn.Module], rules: Rules, tied: dict[str, str]) -> dict[str, PlannedLayer]:
    """Embeddings that an override quantizes, and the layers tied to them, which then compute with the same table."""
    found: dict[str, PlannedLayer] = {}
    for name, module in modules.items():
        chosen = rules.decide_table(name) if is_embedding(module) else None
        if chosen is None or chosen[0] is None:
            continue
        request, rule, _ = chosen
        assert request is not None and isinstance(module.weight, torch.Tensor)
        key = f"{name}.weight"
        sharing = [target.removesuffix(".weight") for target, source in tied.items() if source == key]
        others = [each for each in sharing if not is_linear(modules[each])]
        if key in tied:
            others.append(tied[key])
        if others:
            raise PlanError(
                f"{name} cannot be quantized: it shares its weight with {others[0]}.",
                "drop the override; only linear layers can compute with the table of an embedding.",
            )
        layer = _float_table(name, module.weight)
        scheme, note = fit_group(request.scheme, layer.shape[1], name, rules.config.on_indivisible)
        if scheme is None:
            found[name] = replace(layer, rule=rule, note=note)
            continue
        method = "search" if request.method == CALIBRATED else request.method
        parts = [note, f"one table with {', '.join(sharing)}" if sharing else ""]
        if method != request.method:
            parts.append("quantized without data, as every embedding")
        found[name] = replace(layer, scheme=scheme, method=method, rule=rule, note="; ".join(filter(None, parts)))
        for each in sharing:
            own = rules.decide(each)
            said = own[1].startswith(("override", "skip"))
            if said and (own[0] is None or fit_group(own[0].scheme, layer.shape[1], each, "nearest")[0] != scheme):
                raise PlanError(
                    f"{each} and {name} share one weight, but {own[1]} asks for something else than {rule}.",
                    "ask for the same in both, or leave one of the two out.",
                )
            found[each] = _shared(_float_linear(each, modules[each]), name, rule)
    return found


def fit_group(scheme: Scheme, columns: int, name: str, on_indivisible: str) -> tuple[Scheme | None, str]:
    """The scheme with a group that divides ``columns`` and that its format holds, and a note when it is another one.

    Returns (None, reason) when no group of a table grid fits; raises PlanError instead when ``on_indivisible`` is
    ``error``.
    """
    wanted = scheme.group(columns)
    if scheme.grid == "int":
        if columns % wanted == 0:
            return scheme, ""
        divisor = math.gcd(columns, 1 << (wanted.bit_length() - 1))
        fitted = replace(scheme, group_size=divisor if divisor >= SMALLEST_NEAREST_GROUP else PER_CHANNEL)
    else:
        smallest, largest = TABLE_GROUPS
        if columns % wanted == 0 and wanted.bit_count() == 1 and smallest <= wanted <= largest:
            return replace(scheme, group_size=wanted), ""
        divisor = math.gcd(columns, 1 << (min(wanted, largest).bit_length() - 1))
        if divisor < smallest:
            reason = f"no block size of {scheme.grid} (a power of two >= {smallest}) divides its rows of {columns}"
            if on_indivisible == "error":
                raise PlanError(f"{name}: {reason}.", "skip it, or use grid=int.")
            return None, reason
        fitted = replace(scheme, group_size=divisor)
    if on_indivisible == "error":
        raise PlanError(
            f"{name}: group_size={wanted} does not divide its rows of {columns}.",
            f"use a group that does ({fitted.label}), or on_indivisible='nearest'.",
        )
    asked = "per-channel" if scheme.group_size == PER_CHANNEL else f"group {wanted}"
    return fitted, f"{asked} does not fit rows of {columns}: {fitted.label}"


def _plan_other(full: str, leaf: str, module: nn.Module, parameter: torch.Tensor, tied: dict[str, str]) -> PlannedLayer:
    shape = tuple(parameter.shape)
    if isinstance(module, nn.Embedding):
        kind, note = EMBEDDING, "embeddings stay in float unless an override names them"
    elif leaf == "bias" or leaf.endswith("_bias"):
        kind, note = "Bias", "biases stay in float"
    elif len(shape) <= 1:
        kind, note = "Norm", "vectors (norms, gains) stay in float"
    elif isinstance(module, nn.Linear):
        kind, note = type(module).__name__, "a subclass of nn.Linear: its weight may be read without calling it"
    elif len(shape) == 3 and "expert" in f"{full} {type(module).__name__}".lower():
        kind, note = "Experts", left_fused(module) or "experts in a layout that is not known"
    else:
        kind, note = type(module).__name__, "not a linear layer"
    size = parameter.numel() * parameter.element_size()
    if full in tied:
        note, size = f"tied to {tied[full]}", 0
    name = full.removesuffix(".weight")
    return PlannedLayer(name, kind, shape, None, "", "not a linear layer", note, size, size)


def _plan(model: nn.Module, format_name: str, scale_dtype: str, layers: list[PlannedLayer]) -> Plan:
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    names = [layer.name for layer in layers if layer.scheme is not None]
    matrices = [layer.name for layer in layers if len(layer.shape) == 2]
    stock = stock_experts(model, names), stock_packed(model, names), names_in_files(model, matrices)
    return _with_bytes(Plan(type(model).__name__, kind, format_name, scale_dtype, tuple(layers), *stock))


def _with_bytes(plan: Plan) -> Plan:
    """The plan with the bytes of its layers in its format."""
    return replace(plan, layers=tuple(replace(q, planned_bytes=planned_bytes(q, plan)) for q in plan.layers))


def _model_dtype(model: nn.Module) -> torch.dtype:
    floats: Iterator[torch.dtype] = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.float32)
