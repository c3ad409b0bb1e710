"""Which modules of a model hold fused experts that can be taken apart, under which names, and doing so.

Whether a module was understood is not assumed but tried: a small copy of it, with random weights, has to give the same
outputs taken apart.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from hf_quant.nn.experts import DOWN, GATED, LEAVES, PLAIN, Layout, SplitExperts

TRIED_EXPERTS, TRIED_WIDTH, TRIED_TOKENS = 3, 6, 7
TOLERANCE = 1e-4  # relative, in float32


def expanded_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()``, with fused experts as they would be taken apart (on the meta device)."""
    leaves = leaf_names(model)
    for name, module in model.named_modules():
        if is_fused(module) and isinstance(found := layout_of(module), Layout):
            yield from _split(_on_meta(module), found, leaves, name).named_modules(prefix=name)
        else:
            yield name, module


def split_experts(model: nn.Module, wanted: Collection[str] | None = None) -> list[str]:
    """Take apart all fused experts of a model in place, where that is possible; weights are not copied.

    Args:
        model: on any device.
        wanted: only when one of these names is that of a layer within experts; None always.

    Returns:
        Names of the modules that were taken apart.
    """
    found = {}
    for name, module in model.named_modules():
        layout = layout_of(module) if is_fused(module) else ""
        if isinstance(layout, Layout):
            found[name] = layout
    if wanted is not None and not any(layer.startswith(f"{name}.") for name in found for layer in wanted):
        return []
    leaves = leaf_names(model)
    for name, layout in found.items():
        model.set_submodule(name, _split(model.get_submodule(name), layout, leaves, name))
    return list(found)


@contextmanager
def experts_apart(model: nn.Module, wanted: Collection[str]) -> Iterator[None]:
    """:func:`split_experts`; what goes wrong inside leaves the model as it was."""
    split_experts(model, wanted)
    try:
        yield
    except BaseException:
        fuse_experts(model)
        raise


def fuse_experts(model: nn.Module) -> None:
    """Put the experts of a float model together again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitExperts):
            model.set_submodule(name, module.fused())


def split_modules(model: nn.Module) -> dict[str, SplitExperts]:
    """The experts of a model that were taken apart, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SplitExperts)}


def stock_experts(model: nn.Module, quantized: Collection[str]) -> str:
    """What stock transformers makes of a checkpoint whose experts are stored one by one.

    ``""`` when they are like any other layers to it; ``merged`` when it puts them together as it loads them, ``float``
    when it would and none of these layers is within them; ``apart`` when it does not put quantized ones together: then
    it leaves them at random values.
    """
    # imported here: transformers imports our plugin, and with it this file, along with its quantizers
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    leaves = leaf_names(model)
    result = ""
    for name, module in model.named_modules():
        split = isinstance(module, SplitExperts)
        if not (split or is_fused(module)):
            continue
        kind = type(module.original if isinstance(module, SplitExperts) else module).__name__
        if kind in MODULES_TO_PATCH_FOR_QUANTIZATION:
            continue
        merges = any(f".{name}.{DOWN}".endswith(ending) for ending in leaves)
        if not any(layer.startswith(f"{name}.") for layer in quantized):
            result = result or ("float" if merges else "")
        elif not merges:
            return "apart"
        else:
            result = "merged"
    return result


def _split(module: nn.Module, layout: Layout, leaves: dict[str, tuple[str, ...]], name: str) -> SplitExperts:
    def known(parameter: str, default: tuple[str, ...]) -> tuple[str, ...]:
        full = f".{name}.{parameter}"
        found = next((value for ending, value in leaves.items() if full.endswith(ending)), default)
        return found if len(found) == len(default) else default

    first = known(layout.first, LEAVES[:2] if layout.gated else LEAVES[1:2])
    return SplitExperts(module, layout, (*LEAVES[: 2 - len(first)], *first, *known(DOWN, LEAVES[2:])))


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy that can be taken apart without touching the module."""
    made = copy.copy(module)
    parameters = {
        name: None if p is None else nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
        for name, p in module._parameters.items()
    }
    made.__dict__ = {**module.__dict__, "_parameters": parameters}
    return made


# --- names -----------------------------------------------------------------------------------------------------------


def merged_leaves(conversion: object) -> tuple[str, tuple[str, ...]] | None:
    """Of a conversion that only puts the experts of a checkpoint together: what its target ends in, and their names.

    ``experts.*.w1.weight, experts.*.w3.weight -> experts.gate_up_proj`` gives ``.experts.gate_up_proj, (w1, w3)``.
    """
    if not isinstance(conversion, WeightConverter) or len(conversion._original_target_patterns) != 1:
        return None
    kinds = [type(operation) for operation in conversion.operations]
    sources = [_plain(pattern) for pattern in conversion._original_source_patterns]
    if kinds != ([MergeModulelist] if len(sources) == 1 else [MergeModulelist, Concatenate]):
        return None
    merge, *rest = conversion.operations
    if merge.dim != 0 or any(operation.dim != 1 for operation in rest):
        return None
    target = _plain(conversion._original_target_patterns[0])
    where, _, _ = target.rpartition(".")
    parts = [re.fullmatch(re.escape(where) + r"\.\*\.([^.]+)\.weight", source) for source in sources]
    if not all(parts):
        return None
    return f".{target.lstrip('.')}", tuple(part[1] for part in parts if part)


def leaf_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Ending of a fused parameter's name -> the names that a checkpoint of this model has for its parts."""
    if not hasattr(model, "base_model_prefix"):
        return {}  # not a model of transformers
    mapping = get_model_conversion_mapping(cast(Any, model), add_legacy=False)
    found = (merged_leaves(conversion) for conversion in mapping)
    return dict(pair for pair in found if pair is not None)


def _plain(pattern: str) -> str:
    return pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")


# --- which modules can be taken apart --------------------------------------------------------------------------------


def left_fused(module: nn.Module) -> str:
    """Why fused experts stay as they are, hence in float; empty when they can be taken apart, or there are none."""
    found = layout_of(module) if is_fused(module) else ""
    return f"fused experts that cannot be taken apart: {found}" if isinstance(found, str) and found else ""


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds experts as 3-D parameters."""
    found = module._parameters
    first = found.get(GATED) if GATED in found else found.get(PLAIN)
    down = found.get(DOWN)
    return first is not None and down is not None and first.ndim == down.ndim == 3 and len(first) == len(down)


_tried: dict[tuple[Any, ...], Layout | str] = {}


def layout_of(module: nn.Module) -> Layout | str:
    """How a module that :func:`is_fused` holds its experts, or why it cannot be taken apart."""
    shapes = tuple((name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None)
    flags = tuple(getattr(module, name, None) for name in _FLAGS)
    key = (type(module), shapes, flags)
    if key not in _tried:
        _tried[key] = _try_layouts(module)
    return _tried[key]


_FLAGS = ("has_gate", "is_transposed", "is_concatenated", "has_bias", "has_post_expert_norm")


def _candidates(module: nn.Module) -> Iterator[Layout]:
    """Layouts that the shapes allow; the one that the class declares, where it does."""
    gated = GATED in module._parameters
    first, down = module._parameters[GATED if gated else PLAIN], module._parameters[DOWN]
    assert first is not None and down is not None
    biased = f"{DOWN}_bias" in module._parameters
    declared = hasattr(module, "is_transposed")
    batched = len(inspect.signature(type(module).forward).parameters) == 2
    orders = (not module.is_concatenated,) if declared else (False, True)
    sides = (bool(module.is_transposed),) if declared else (False, True)
    for transposed, interleaved in itertools.product(sides, orders):
        outer, hidden = first.shape[:0:-1] if transposed else first.shape[1:]
        inter = outer // 2 if gated else outer
        expected = (inter, hidden) if transposed else (hidden, inter)
        if tuple(down.shape[1:]) == expected and (not gated or outer % 2 == 0):
            yield Layout(gated, transposed, bool(interleaved), biased, batched, len(down), hidden, inter)


def _try_layouts(module: nn.Module) -> Layout | str:
    known = {name for name, p in module._parameters.items() if p is not None}
    reason = "the shapes of its parameters do not fit each other"
    for layout in _candidates(module):
        if known != set(layout.parameters):
            return f"it has parameters besides those of its experts ({sorted(known - set(layout.parameters))[0]})"
        try:
            if _agrees(module, layout):
                return layout
            reason = "taken apart, it does not give the same outputs"
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"a trial of it failed ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return reason


@torch.no_grad()
def _agrees(module: nn.Module, layout: Layout) -> bool:
    """Whether a small copy of the module gives the same outputs whole and taken apart."""
    generator = torch.Generator().manual_seed(0)
    experts, inter, hidden = TRIED_EXPERTS, TRIED_WIDTH, layout.hidden
    outer = 2 * inter if layout.gated else inter
    shapes = {layout.first: (experts, outer, hidden), DOWN: (experts, hidden, inter)}
    if layout.transposed:
        shapes = {name: (count, columns, rows) for name, (count, rows, columns) in shapes.items()}
    biases = {f"{layout.first}_bias": (experts, outer), f"{DOWN}_bias": (experts, hidden)} if layout.biased else {}

    def values(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu") * scale

    def small() -> nn.Module:
        made = copy.copy(module)
        children = {name: _on_cpu(child, values) for name, child in module._modules.items()}
        made.__dict__ = {**module.__dict__, "_modules": children, "_parameters": dict(parameters)}
        for name, value in module.__dict__.items():  # sizes that a forward may use
            if type(value) is int and value == layout.experts and "expert" in name and "dim" not in name:
                setattr(made, name, experts)
            elif type(value) is int and value == layout.inter != hidden:
                setattr(made, name, inter)
        if hasattr(module, "config"):
            config: Any = copy.copy(module.config)
            config._experts_implementation_internal = "eager"
            made.config = config
        return made

    tensors = {name: values(*shape, scale=shape[-1] ** -0.5) for name, shape in (shapes | biases).items()}
    parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in tensors.items()}
    if layout.batched:
        x = values(experts * 2, hidden)
        exact, found = small()(x), SplitExperts(small(), _resized(layout))(x)
    else:
        x, weights = values(TRIED_TOKENS, hidden), values(TRIED_TOKENS, 2).abs()
        index = torch.tensor([(i % 3, (i + 1 + i % 2) % 3) for i in range(TRIED_TOKENS)], device="cpu")
        exact, found = small()(x, index, weights), SplitExperts(small(), _resized(layout))(x, index, weights)
    same = found.shape == exact.shape and bool((found - exact).norm() <= TOLERANCE * exact.norm())
    return same and bool(exact.norm() > 0)


def _resized(layout: Layout) -> Layout:
    return replace(layout, experts=TRIED_EXPERTS, inter=TRIED_WIDTH)


def _on_cpu(child: nn.Module | None, values: Any) -> nn.Module | None:
    if child is None or not any(True for _ in itertools.chain(child.parameters(), child.buffers())):
        return child
    made = copy.deepcopy(child).to_empty(device="cpu").float()
    for parameter in made.parameters():
        parameter.copy_(values(*parameter.shape))
    return made
