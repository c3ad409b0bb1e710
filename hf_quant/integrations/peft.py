"""LoRA through peft: adapters train on packed layers, merge with a stated cost, and need nothing but `import hf_quant`.

Importing this file registers with peft; :mod:`hf_quant` does so once peft's LoRA model is imported. Never ran on CUDA.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from peft.tuners import tuners_utils
from peft.tuners.lora import layer as lora_layers
from peft.tuners.lora.model import LoraModel
from peft.utils import other as peft_other
from torch import nn

from hf_quant.errors import ConfigError, DependencyError
from hf_quant.integrations.published import model_dtype
from hf_quant.nn.linear import QuantLinear
from hf_quant.quantize.merge import MergeCost, MergeReport, merge_delta
from hf_quant.tensor import QuantizedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("hf_quant")
OLDEST = Version("0.21")  # the release whose hooks these are
# the other initial values of peft are computed from the float weight, or written back into it
_INITIAL_VALUES = (True, False, "gaussian", "eva")
_KBIT_FLAG = "is_loaded_in_4bit"
_HOOKS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (LoraModel, ("_create_new_module", "merge_adapter", "merge_and_unload")),
    (tuners_utils, ("_maybe_include_all_linear_layers", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "SEQ_CLS_HEAD_NAMES")),
    (peft_other, ("prepare_model_for_kbit_training",)),
)
_costs: ContextVar[list[MergeCost] | None] = ContextVar("hf_quant_merge_costs", default=None)


class MergeWarning(UserWarning):
    """Adapters were merged into quantized weights; the message says what rounding them cost."""


class LoraQuantLinear(lora_layers.Linear):  # "Linear" in the name is how peft knows a linear layer that has an adapter
    """LoRA around a QuantLinear whose codes never change while it trains.

    ``y = base(x) + scaling * lora_B(lora_A(dropout(x)))``; the adapter is float32 unless it is asked for otherwise.

    Merging re-quantizes ``dequantize(base) + delta`` onto the grid of the base, rounding at random so that the update
    survives (see :mod:`hf_quant.quantize.merge`): the merged model keeps its size, its kernels and its stock format,
    and pays with noise: :attr:`merge_cost` says how much. While an adapter is merged, the packed original is kept
    (another 4 or 8 bits per weight; ``merge_and_unload`` drops it), so unmerging is exact.
    """

    original: QuantizedTensor | None = None
    original_bias: torch.Tensor | None = None
    merge_cost: MergeCost | None = None

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        self.layer_name: str = kwargs.get("target_name", "")
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False  # our weight is [out, in], also where the float layer was a Conv1D

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, QuantLinear)
        return module.in_features, module.out_features  # peft finds the same, after a warning about an unknown layer

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter; raises ConfigError for what cannot train on a packed weight."""
        _refuse_unsupported(config, self.layer_name)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Re-quantize base + adapters; the error is noted, and warned about with its number.

        Args:
            safe_merge: accepted for peft; NaN and Inf are always refused, before anything changes.
            adapter_names: default: the active ones; those merged before are rounded with them, from the original.

        Raises:
            WeightError: an adapter holds NaN or Inf.
            ConfigError: an adapter has a bias, and the layer has none.
        """
        wanted = tuners_utils.check_adapters_to_merge(self, adapter_names)
        names = [name for name in wanted if name in self.lora_A]
        if not names:
            return
        base = self.quant_layer
        merged = [*self.merged_adapters, *names]
        bias = self.bias_with(merged)
        original = base.quantized() if self.original is None else self.original.to(base.weight.device)
        tensor, cost = merge_delta(original, self.delta(merged), name=self.layer_name)
        base.assign(tensor)
        if bias is not None and base.bias is not None:
            self.original_bias = base.bias.data if self.original_bias is None else self.original_bias
            base.bias.data = bias
        self.original, self.merge_cost = original, cost
        self.merged_adapters.extend(names)
        _note(cost)

    def unmerge(self) -> None:
        """The original weight again, bit for bit."""
        if self.original is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.quant_layer
        base.assign(self.original.to(base.weight.device))
        if self.original_bias is not None and base.bias is not None:
            base.bias.data = self.original_bias.to(base.weight.device)
        self.original = self.original_bias = self.merge_cost = None
        self.merged_adapters.clear()

    @property
    def quant_layer(self) -> QuantLinear:
        """The quantized layer below all adapters."""
        base: QuantLinear = self.get_base_layer()
        return base

    @torch.no_grad()
    def delta(self, names: list[str]) -> torch.Tensor:
        """The sum of these adapters' updates: float32 ``[out, in]``."""
        shape, device = (self.out_features, self.in_features), self.quant_layer.weight.device
        total = torch.zeros(shape, dtype=torch.float32, device=device)
        for name in names:
            if name in self.lora_A:
                total += self.get_delta_weight(name)
        return total

    def original_weight(self) -> torch.Tensor:
        """The weight without adapters: float32 ``[out, in]``."""
        return (self.original or self.quant_layer.quantized()).dequantize()

    def bias_with(self, names: list[str]) -> torch.Tensor | None:
        """The bias ``[out]`` of the base with those of these adapters; None when the layer has none."""
        biased = [name for name in names if self.lora_bias.get(name)]
        bias = self.quant_layer.bias if self.original_bias is None else self.original_bias
        if bias is None:
            if biased:
                raise ConfigError(
                    f"{self.layer_name} has no bias to merge the bias of adapter {biased[0]!r} into.",
                    "keep the adapter unmerged, or train it with lora_bias=False.",
                )
            return None
        total = bias.detach().to(torch.float32)
        for name in biased:
            total = total + self.lora_B[name].bias.detach().to(total) * self.scaling[name]
        return total.to(bias.dtype)


def _refuse_unsupported(config: Any, name: str) -> None:
    """Raise ConfigError for what would read or write the packed codes as if they were a float weight."""
    where = f"{name}: " if name else ""
    variants = [
        field.name
        for field in dataclasses.fields(config)
        if (field.metadata.get("is_lora_variant") or field.name == "use_qalora") and getattr(config, field.name)
    ]
    if variants:
        raise ConfigError(
            f"{where}{variants[0]}={getattr(config, variants[0])!r} is not supported on quantized layers.",
            "train plain LoRA (use_rslora, lora_dropout, rank_pattern work), or dequantize the model first.",
        )
    initial = config.init_lora_weights
    if (initial.lower() if isinstance(initial, str) else initial) not in _INITIAL_VALUES:
        raise ConfigError(
            f"{where}init_lora_weights={initial!r} needs the float weight, and this layer has packed codes.",
            "use True, 'gaussian' or 'eva' (when an adapter is loaded, its initial values do not matter).",
        )


# --- merging ---------------------------------------------------------------------------------------------------------


def merge_cost(model: nn.Module, adapter_names: list[str] | None = None) -> MergeReport:
    """What merging adapters into the quantized layers costs, or has cost where they are merged; changes nothing.

    Args:
        model: with LoRA adapters on quantized layers.
        adapter_names: default: the active ones.

    Raises:
        ConfigError: no quantized layer has such an adapter.
        WeightError: an adapter holds NaN or Inf.
    """
    costs = []
    for layer in model.modules():
        if not isinstance(layer, LoraQuantLinear):
            continue
        names = [name for name in adapter_names or layer.active_adapters if name in layer.lora_A]
        if layer.merge_cost is not None and sorted(names) == sorted(layer.merged_adapters):
            costs.append(layer.merge_cost)
        elif names:
            original = layer.original or layer.quant_layer.quantized()
            costs.append(merge_delta(original, layer.delta(names), name=layer.layer_name)[1])
    if not costs:
        wanted = f"adapter {', '.join(adapter_names)}" if adapter_names else "active LoRA adapter"
        raise ConfigError(f"no quantized layer of {type(model).__name__} has an {wanted}.", "add one with peft first.")
    return MergeReport.of(costs)


def merge_to_float(
    model: nn.Module, dtype: torch.dtype | None = None, adapter_names: list[str] | None = None
) -> PreTrainedModel:
    """Dequantize the model and merge its adapters without rounding to the grid: nothing is lost.

    The result is an ordinary float model. Quantizing it again without calibration data rounds to the nearest codes,
    which are those of the base: most of the adapter is lost (``merge_and_unload`` on the quantized model keeps it).

    Args:
        model: a PeftModel; it is taken apart, use the result instead.
        dtype: of the result; default: the model's own.
        adapter_names: default: the active ones.

    Raises:
        ConfigError: not a PeftModel with LoRA on quantized layers.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, LoraModel):
        raise ConfigError(f"{type(model).__name__} is not a PeftModel with LoRA.", "pass what get_peft_model returned.")
    base = tuner.model
    names = [name for name, layer in base.named_modules() if isinstance(layer, LoraQuantLinear)]
    if not names:
        raise ConfigError(f"{type(base).__name__} has no quantized layer with LoRA.", "call merge_and_unload() on it.")
    settled = model_dtype(base, dtype)
    for name in names:
        layer = base.get_submodule(name)
        assert isinstance(layer, LoraQuantLinear)
        base.set_submodule(name, _merged_float(layer, settled, adapter_names))
    plain: PreTrainedModel = tuner.merge_and_unload(adapter_names=adapter_names)
    plain.dequantize(settled)
    return plain


@torch.no_grad()
def _merged_float(layer: LoraQuantLinear, dtype: torch.dtype, adapter_names: list[str] | None) -> nn.Module:
    from hf_quant.nn.swap import put_float

    names = [name for name in adapter_names or layer.active_adapters if name in layer.lora_A]
    bias = layer.bias_with(names)
    weight = layer.original_weight() + layer.delta(names)
    holder = nn.Module()
    holder.layer = layer.quant_layer
    put_float(holder, dtype)
    plain = holder.get_submodule("layer")
    assert isinstance(plain.weight, nn.Parameter)
    plain.weight.data = (weight if plain.weight.shape == weight.shape else weight.t().contiguous()).to(dtype)
    if bias is not None and isinstance(plain.bias, nn.Parameter):
        plain.bias.data = bias.detach().to(dtype)
    return plain


def _note(cost: MergeCost) -> None:
    found = _costs.get()
    _warn(MergeReport.of([cost])) if found is None else found.append(cost)


def _warn(report: MergeReport) -> None:
    if report.layers:
        warnings.warn(
            f"{report}. Measure the merged model, keep the adapter unmerged, or lose nothing with "
            "hf_quant.integrations.peft.merge_to_float(model).",
            MergeWarning,
            stacklevel=5,
        )


@contextmanager
def _one_warning() -> Iterator[None]:
    """One warning for all layers that are merged inside."""
    costs: list[MergeCost] = []
    token = _costs.set(costs)
    try:
        yield
    finally:
        _costs.reset(token)
    _warn(MergeReport.of(costs))


# --- registration ----------------------------------------------------------------------------------------------------


def _creating(create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """peft's choice of a LoRA layer, with ours for QuantLinear (a user's own custom module goes first)."""

    @functools.wraps(create)
    def wrapper(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
        custom = tuple(getattr(lora_config, "_custom_modules", None) or ())
        if not isinstance(base, QuantLinear) or isinstance(base, custom):
            return create(lora_config, adapter_name, target, **kwargs)
        installed = importlib.metadata.version("peft")
        if Version(installed) < OLDEST:
            raise DependencyError(f"peft {installed} cannot train quantized layers.", f"install peft >= {OLDEST}.")
        if kwargs.get("parameter_name"):
            name = f"{kwargs.get('target_name')}.{kwargs['parameter_name']}"
            raise ConfigError(f"target_parameters names {name}, which is packed.", "name the module in target_modules.")
        return LoraQuantLinear(target, adapter_name, lora_config, **kwargs)

    return wrapper


def _including(include: Callable[..., Any]) -> Callable[..., Any]:
    """``target_modules="all-linear"``, which looks for nn.Linear, finds QuantLinears too; never an output head."""

    @functools.wraps(include)
    def wrapper(peft_config: Any, model: nn.Module) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        config = include(peft_config, model)
        if isinstance(asked, str) and asked.lower() == tuners_utils.INCLUDE_LINEAR_LAYERS_SHORTHAND:
            config.target_modules |= _quantized_targets(model)
        return config

    return wrapper


def _quantized_targets(model: nn.Module) -> set[str]:
    find_head = getattr(model, "get_output_embeddings", None)
    heads = [find_head() if callable(find_head) else None]
    heads += [getattr(model, name, None) for name in tuners_utils.SEQ_CLS_HEAD_NAMES]
    adapted = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, tuners_utils.BaseTunerLayer)
    )
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        and not any(module is head for head in heads)
        and not name.startswith(adapted)  # already the base layer of an adapter
    }


def _preparing(prepare: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """peft's preparation of k-bit models: it takes ours for one, and keeps its hands off the stored scales."""

    @functools.wraps(prepare)
    def wrapper(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
        if not layers:
            return prepare(model, *args, **kwargs)
        # it would widen the scales to float32: the same values, twice the bytes
        packed = [(p, p.data) for layer in layers for leaf, p in layer.named_parameters() if leaf != "bias"]
        flagged = _KBIT_FLAG in vars(model)
        if not flagged:
            setattr(model, _KBIT_FLAG, True)  # for this call only: accelerate reads it as "may not be moved"
        try:
            return prepare(model, *args, **kwargs)
        finally:
            if not flagged:
                delattr(model, _KBIT_FLAG)
            for parameter, data in packed:
                parameter.data = data

    return wrapper


def _merging(merge: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(merge)
    def wrapper(self: LoraModel, *args: Any, **kwargs: Any) -> Any:
        with _one_warning():
            return merge(self, *args, **kwargs)

    return wrapper


def _replace(function: Callable[..., Any], wrap: Callable[..., Callable[..., Any]]) -> None:
    """Wrap a function of peft wherever it was imported by name, before us or after."""
    name, wrapped = function.__name__, wrap(function)
    for module in list(sys.modules.values()):
        if vars(module).get(name) is function:
            setattr(module, name, wrapped)


def register() -> None:
    """Make peft know QuantLinear; safe to call again. A peft that has changed is left alone, with a warning."""
    if "hf_quant_registered" in vars(LoraModel):
        return
    missing = [f"{owner.__name__}.{name}" for owner, names in _HOOKS for name in names if not hasattr(owner, name)]
    if missing:
        found = importlib.metadata.version("peft")
        logger.warning("peft %s has no %s: LoRA on quantized layers is not available.", found, missing[0])
        return
    LoraModel.hf_quant_registered = True
    LoraModel._create_new_module = staticmethod(_creating(LoraModel._create_new_module))
    for name in ("merge_adapter", "merge_and_unload"):
        setattr(LoraModel, name, _merging(getattr(LoraModel, name)))
    _replace(tuners_utils._maybe_include_all_linear_layers, _including)
    _replace(peft_other.prepare_model_for_kbit_training, _preparing)


register()
