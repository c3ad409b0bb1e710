"""Model skeleton + config -> Plan: per module the scheme and its bytes, or why it stays in float."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_quant.config import HfQuantConfig, LayerRequest
from hf_quant.errors import PlanError
from hf_quant.grids import DOUBLE_QUANT_BLOCK, PER_CHANNEL, Scheme
from hf_quant.nn.splitting import expanded_modules, left_fused

SMALLEST_NEAREST_GROUP = 16
TABLE_GROUPS = (32, 4096)  # smallest and largest block of bitsandbytes' 4-bit kernels; powers of two only
REGEX = "re:"


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

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """Every weight of a model and what happens to it."""

    architecture: str
    model_type: str
    format: str
    scale_dtype: str
    layers: tuple[PlannedLayer, ...]

    @cached_property
    def quantized(self) -> tuple[PlannedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.scheme is not None)

    @cached_property
    def kept(self) -> tuple[PlannedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.scheme is None)

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
    rules = _Rules(model, config, modules, list(linears))
    tied = _tied(model)
    layers: list[PlannedLayer] = []
    for name, module in modules.items():
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}" if name else leaf
            if leaf == "weight" and name in linears:
                layers.append(_plan_linear(name, linears[name], rules, tied))
            else:
                layers.append(_plan_other(full, leaf, module, parameter, tied))
    text_config = getattr(model, "config", None)
    plan = Plan(
        architecture=type(model).__name__,
        model_type=str(getattr(text_config, "model_type", "")),
        format="compressed-tensors" if config.grid == "int" else "bitsandbytes",
        scale_dtype=resolve_scale_dtype(config, _model_dtype(model)),
        layers=tuple(layers),
    )
    plan = _with_bytes(plan)
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
            if leaf != "weight" or not is_linear(module):
                layers.append(_plan_other(full, leaf, module, parameter, tied))
                continue
            layer, scheme = _float_linear(name, module), schemes.get(name)
            note = "" if scheme else "stored in float"
            layers.append(replace(layer, scheme=scheme, rule="as the checkpoint has it", note=note))
    return _with_bytes(
        Plan(
            architecture=type(model).__name__,
            model_type=str(getattr(getattr(model, "config", None), "model_type", "")),
            format=format_name,
            scale_dtype=scale_dtype,
            layers=tuple(layers),
        )
    )


def is_linear(module: nn.Module) -> bool:
    """Layers whose weight is only ever used by calling them: ``nn.Linear`` itself and GPT-2's transposed ``Conv1D``."""
    return type(module) is nn.Linear or type(module) is Conv1D


def resolve_scale_dtype(config: HfQuantConfig, model_dtype: torch.dtype) -> str:
    """``auto``: float16 for float16 models, else bfloat16."""
    if config.scale_dtype != "auto":
        return config.scale_dtype
    return "float16" if model_dtype == torch.float16 else "bfloat16"


def matches(pattern: str, name: str) -> bool:
    """Whether an override or skip pattern names this module (see :class:`HfQuantConfig`)."""
    if pattern.startswith(REGEX):
        return re.fullmatch(pattern[len(REGEX) :], name) is not None
    return name == pattern or name.startswith(pattern + ".") or name.endswith("." + pattern)


class _Rules:
    """Exact override, then skip, then other overrides in order, then the default skips, then the default."""

    def __init__(
        self, model: nn.Module, config: HfQuantConfig, modules: Mapping[str, nn.Module], names: list[str]
    ) -> None:
        self.config = config
        self.default_skips = _default_skips(model, modules)
        for option, patterns in (("overrides", config.overrides), ("skip", config.skip)):
            for pattern in patterns:
                self._check(option, pattern, names)
        both = set(config.skip) & {p for p, v in config.overrides.items() if not isinstance(v, str)}
        if both:
            raise PlanError(f"{sorted(both)[0]!r} is in skip and in overrides.", "keep it in one of them.")

    @staticmethod
    def _check(option: str, pattern: str, names: list[str]) -> None:
        try:
            if any(matches(pattern, name) for name in names):
                return
        except re.error as error:
            raise PlanError(
                f"{option} pattern {pattern!r} is not a regular expression: {error}.", "mend it."
            ) from error
        bare = pattern.removeprefix(REGEX)
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
        near = difflib.get_close_matches(bare, names + leaves, n=3, cutoff=0.4) or leaves[:5]
        raise PlanError(
            f"{option} pattern {pattern!r} matches no linear layer of this model.", f"nearest names: {', '.join(near)}."
        )

    def decide(self, name: str) -> tuple[LayerRequest | None, str, str]:
        """(request or None, rule, note) for a linear layer."""
        if name in self.config.overrides:
            return self._override(name)
        for pattern in self.config.skip:
            if matches(pattern, name):
                return None, f"skip {pattern!r}", "left in float on request"
        for pattern in self.config.overrides:
            if matches(pattern, name):
                return self._override(pattern)
        if name in self.default_skips:
            return None, "default skip", self.default_skips[name]
        return self.config.default, "default", ""

    def _override(self, pattern: str) -> tuple[LayerRequest | None, str, str]:
        request = self.config.override(pattern)
        return request, f"override {pattern!r}", "" if request else "left in float on request"


def _default_skips(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Modules that stay in float unless an override names them, with the reason."""
    skips: dict[str, str] = {}
    output_head = getattr(model, "get_output_embeddings", None)
    head = output_head() if callable(output_head) else None
    keep: set[str] = set()
    for owner in modules.values():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            keep |= set(getattr(owner, attribute, None) or ())
    last = next(reversed([name for name, module in modules.items() if any(True for _ in module.parameters(False))]))
    for name, module in modules.items():
        if not is_linear(module):
            continue
        if module is head:
            skips[name] = "output head"
        elif any(pattern in name.split(".") or matches(pattern, name) for pattern in keep):
            skips[name] = "the model keeps it in float32"
        elif name == last:
            skips[name] = "last layer of the model (its head)"
    return skips


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


def _plan_linear(name: str, module: nn.Module, rules: _Rules, tied: dict[str, str]) -> PlannedLayer:
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
        kind, note = "Embedding", "embeddings stay in float"
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


def _with_bytes(plan: Plan) -> Plan:
    return replace(plan, layers=tuple(replace(q, planned_bytes=_planned_bytes(q, plan)) for q in plan.layers))


def _planned_bytes(layer: PlannedLayer, plan: Plan) -> int:
    """Bytes of the layer's tensors in the published format (its bias is a row of its own)."""
    scheme = layer.scheme
    if scheme is None:
        return layer.float_bytes
    rows, columns = layer.shape
    groups = scheme.groups(columns)
    if plan.format == "bitsandbytes":
        scales = rows * groups
        header = 16 * 4 + _state_bytes(layer, scheme, plan.scale_dtype)  # quant_map and the quant_state
        nested = scales + 4 * math.ceil(scales / DOUBLE_QUANT_BLOCK) + 256 * 4
        return rows * columns // 2 + (nested if scheme.double_quant else 4 * scales) + header
    codes = rows * 4 * math.ceil(columns * scheme.bits / 32)
    zeros = 0 if scheme.symmetric else 4 * math.ceil(rows * scheme.bits / 32) * groups
    return codes + rows * groups * getattr(torch, plan.scale_dtype).itemsize + zeros + 2 * 8


def _state_bytes(layer: PlannedLayer, scheme: Scheme, scale_dtype: str) -> int:
    """Length of the json in which bitsandbytes describes a weight (its mean scale has a varying number of digits)."""
    half = scale_dtype if scale_dtype != "float32" else "bfloat16"
    state: dict[str, object] = {
        "quant_type": scheme.grid,
        "blocksize": scheme.group(layer.shape[1]),
        "dtype": "float32" if layer.float_bytes == 4 * layer.numel else half,
        "shape": list(layer.shape),
    }
    if scheme.double_quant:
        state |= {
            "nested_blocksize": DOUBLE_QUANT_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": 0.0123456789012345,
        }
    return len(json.dumps(state))


def _model_dtype(model: nn.Module) -> torch.dtype:
    floats: Iterator[torch.dtype] = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.float32)
