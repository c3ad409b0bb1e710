"""The transformers plugin: quantize on load, load what was quantized on our own runtime, save in stock formats."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_quant.checkpoint import check_directory
from hf_quant.config import QUANT_METHOD, HfQuantConfig
from hf_quant.errors import CheckpointError, FormatError, HfQuantError, KernelError
from hf_quant.formats import FORMATS, Format, bitsandbytes, compressed_tensors
from hf_quant.grids import Scheme
from hf_quant.kernels import registry
from hf_quant.nn.linear import QuantLinear
from hf_quant.nn.swap import float_shape, put_empty, put_float, quantized_modules
from hf_quant.plan import Plan, is_linear, make_plan
from hf_quant.provenance import KEY, make_provenance
from hf_quant.quantize.weight import quantize_weight

logger = logging.getLogger("hf_quant")
RUNTIME_VARIABLE = "HF_QUANT_RUNTIME"
_kernel: ContextVar[str] = ContextVar("hf_quant_kernel", default=registry.AUTO)
_STOCK = {compressed_tensors.NAME: compressed_tensors.NAME, "bitsandbytes_4bit": bitsandbytes.NAME}
_replaced: dict[str, Any] = {}


@contextmanager
def requested_kernel(name: str) -> Iterator[None]:
    """Every layer made inside asks for this kernel; raises ConfigError for an unknown name."""
    token = _kernel.set(registry.check_name(name))
    try:
        yield
    finally:
        _kernel.reset(token)


class PublishedConfig(QuantizationConfigMixin):
    """The stock ``quantization_config`` of a model in memory: what ``save_pretrained`` writes to config.json."""

    def __init__(self, published: Mapping[str, Any]) -> None:
        self.published = dict(published)
        self.quant_method = self.published["quant_method"]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.published)


class _Runtime(HfQuantizer):
    """What both quantizers share: layers to swap, errors that survive transformers' loader, saving, expanding.

    transformers collects the exceptions of weight conversions into a report and raises a RuntimeError of its own. So a
    conversion that fails is noted here, the remaining ones do nothing, and the typed error is raised after loading.
    """

    requires_calibration = False

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan: Plan | None = None
        self.failure: HfQuantError | None = None
        self.format_name = ""

    @property
    def format(self) -> Format:
        return FORMATS[self.format_name]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise CheckpointError(
                "device_map places modules on disk, and quantize-on-load cannot write them there.",
                "quantize with `hf_quant.quantize(model, config, output_dir)` first, then load the result.",
            )

    def _check_files(self, model: nn.Module, checkpoint_files: list[str] | None) -> None:
        """Validate index and headers before transformers opens a shard (it joins the index's names unchecked)."""
        name = getattr(getattr(model, "config", None), "name_or_path", "")
        if name and Path(name).is_dir():
            directory = Path(name)
        elif checkpoint_files:
            directory = Path(checkpoint_files[0]).parent
        else:
            return
        if (directory / "config.json").exists():
            check_directory(directory)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.failure is not None:
            raise self.failure
        conversions = getattr(model, "_weight_conversions", None) or []
        # our own conversions are undone by get_state_dict_and_metadata, with names that transformers cannot revert
        model._weight_conversions = [c for c in conversions if not _is_ours(c)]  # type: ignore[assignment]
        if getattr(self.quantization_config, "dequantize", False):
            put_float(model, self._dtype(model))
            self.remove_quantization_config(model)
            return model
        publish(model, self)
        prepare(model)
        return model

    def note(self, error: HfQuantError) -> None:
        if self.failure is None:
            self.failure = error

    @staticmethod
    def _dtype(model: nn.Module, dtype: torch.dtype | str | None = None) -> torch.dtype:
        """A dtype that may be a string: save_pretrained leaves one in ``config.dtype``."""
        found = dtype or getattr(model.config, "dtype", None) or torch.float32
        return getattr(torch, found.removeprefix("torch.")) if isinstance(found, str) else found

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        put_float(model, self._dtype(model, dtype))
        model.config.__dict__.pop(KEY, None)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        state = model.state_dict()
        dtype = self._dtype(model)
        for name, layer in quantized_modules(model):
            for leaf in [leaf for leaf in layer._parameters if leaf != "bias"]:
                state.pop(f"{name}.{leaf}", None)
            for suffix, tensor in self.format.encode(layer.quantized(), dtype=dtype, name=name).items():
                state[f"{name}.{suffix}"] = tensor
        return state, {}

    def is_serializable(self) -> bool:
        if self.plan is not None:
            self.format.quantization_config(self.plan)  # raises FormatError for what the format cannot hold
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class HfQuantQuantizer(_Runtime):
    """``quantization_config=HfQuantConfig(...)``: a float checkpoint is quantized tensor by tensor as it is read."""

    quantization_config: HfQuantConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self._check_files(model, kwargs.get("checkpoint_files"))
        self.plan = make_plan(model, self.quantization_config)
        self.format_name = self.plan.format
        schemes = {layer.name: layer.scheme for layer in self.plan.quantized if layer.scheme}
        self._methods = {layer.name: layer.method for layer in self.plan.quantized}
        requested = self.quantization_config.kernel
        put_empty(
            model, schemes, getattr(torch, self.plan.scale_dtype), _kernel.get() if requested == "auto" else requested
        )

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, leaf = get_module_from_name(model, param_name)
        return not self.pre_quantized and isinstance(module, QuantLinear) and leaf == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def method(self, name: str) -> str:
        return self._methods[name]


class _Quantize(ConversionOps):
    """One float weight -> the parameters of its QuantLinear."""

    def __init__(self, hf_quantizer: HfQuantQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        assert model is not None
        result: dict[str, torch.Tensor] = {}
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            layer, _ = get_module_from_name(model, key)
            name = key.removesuffix(".weight")
            if self.hf_quantizer.failure is None:
                try:
                    result |= self._quantize(layer, name, weight)
                    continue
                except HfQuantError as error:
                    self.hf_quantizer.note(error)
            result |= _placeholders(layer, name, weight.device)
        return result

    def _quantize(self, layer: QuantLinear, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        plan = self.hf_quantizer.plan
        assert plan is not None
        tensor = quantize_weight(
            weight.t() if layer.transposed_source else weight,
            layer.scheme,
            self.hf_quantizer.method(name),
            scale_dtype=getattr(torch, plan.scale_dtype),
            name=name,
        )
        return {f"{name}.{leaf}": parameter for leaf, parameter in layer.named_tensors(tensor).items()}


class _StockRuntime(_Runtime):
    """A checkpoint in a stock format, kept packed on our kernels."""

    def __init__(self, quantization_config: QuantizationConfigMixin, format_name: str, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.format_name = format_name
        self.serialized_names = {"weight": list(self.format.SUFFIXES)}
        # through JSON, because stock config classes hold enums and tuples where the file holds text and lists
        self.published = json.loads(json.dumps(quantization_config.to_dict()))
        self.resolver = self.format.read_config(self.published)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self._check_files(model, kwargs.get("checkpoint_files"))
        schemes: dict[str, Scheme] = {}
        shapes = _stored_shapes(kwargs.get("checkpoint_files")) if self.format_name == bitsandbytes.NAME else {}
        for name, module in model.named_modules():
            if not name or not is_linear(module):
                continue
            rows, columns = float_shape(module)
            if shapes:
                scheme = bitsandbytes.scheme_from_shapes(_of_module(shapes, name), columns, rows, name=name)
            else:
                scheme = self.resolver(name, columns, rows, (type(module).__name__,))
            if scheme is not None:
                schemes[name] = scheme
        put_empty(model, schemes, self._dtype(model, kwargs.get("dtype")), _kernel.get())

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Decode}


class _Decode(ConversionOps):
    """The stored tensors of one module -> the parameters of its QuantLinear."""

    def __init__(self, hf_quantizer: _StockRuntime) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        assert model is not None and full_layer_name is not None
        tensors = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        layer, leaf = get_module_from_name(model, full_layer_name)
        if not isinstance(layer, QuantLinear):
            # a float weight whose name matches the format's own `weight`: cast as transformers would have done
            value = next(iter(tensors.values()))
            target = getattr(layer, leaf).dtype
            return {full_layer_name: value.to(target) if value.is_floating_point() else value}
        name = full_layer_name.removesuffix(f".{leaf}")
        if self.hf_quantizer.failure is None:
            try:
                tensor = self.hf_quantizer.format.decode(tensors, layer.scheme, name=name)
                return {f"{name}.{leaf}": parameter for leaf, parameter in layer.named_tensors(tensor).items()}
            except HfQuantError as error:
                self.hf_quantizer.note(error)
        return _placeholders(layer, name, next(iter(tensors.values())).device)


def _placeholders(layer: QuantLinear, name: str, device: torch.device) -> dict[str, torch.Tensor]:
    """Uninitialised parameters for a load that has failed already."""
    named = {leaf: p for leaf, p in layer._parameters.items() if p is not None and leaf != "bias"}
    return {
        f"{name}.{leaf}": nn.Parameter(torch.empty_like(p, device=device), requires_grad=False)
        for leaf, p in named.items()
    }


def _is_ours(conversion: object) -> bool:
    operations = conversion.operations if isinstance(conversion, WeightConverter) else []
    return any(isinstance(operation, _Decode) for operation in operations)


def _stored_shapes(checkpoint_files: list[str] | None) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in checkpoint_files or []:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                shapes[key] = tuple(file.get_slice(key).get_shape())
    return shapes


def _of_module(shapes: Mapping[str, tuple[int, ...]], name: str) -> dict[str, tuple[int, ...]]:
    """suffix -> shape of one module; a checkpoint may lack or carry the base model's prefix."""
    candidates = [name, name.partition(".")[2], *(p for p in (f"model.{name}", f"transformer.{name}"))]
    for candidate in candidates:
        found = {s: shapes[f"{candidate}.{s}"] for s in bitsandbytes.SUFFIXES if f"{candidate}.{s}" in shapes}
        if found:
            return found
    return {}


def publish(model: PreTrainedModel, quantizer: _Runtime) -> None:
    """Give a quantized model the config that describes it to stock loaders, and its provenance."""
    config = model.config
    if quantizer.plan is not None and isinstance(quantizer.quantization_config, HfQuantConfig):
        source = getattr(config, "_name_or_path", None) or None
        provenance = make_provenance(
            quantizer.plan, quantizer.quantization_config, source, getattr(config, "_commit_hash", None)
        )
        setattr(config, KEY, provenance)
        try:
            published = quantizer.format.quantization_config(quantizer.plan, dtype=_Runtime._dtype(model))
        except FormatError as error:
            # it runs, but it cannot be saved as it is: is_serializable() says so before anything is written
            logger.info("this model cannot be saved: %s", error)
            published = {"quant_method": QUANT_METHOD}
        config.quantization_config = PublishedConfig(published)
    else:
        config.quantization_config = PublishedConfig(getattr(quantizer, "published", {}))
    model.quantization_method = QUANT_METHOD
    model.is_quantized = True


def prepare(model: nn.Module) -> None:
    """Choose a kernel for every layer now, and say in one log line which ones run.

    Raises:
        KernelError: a kernel was asked for by name that cannot run a layer.
    """
    dtype = _Runtime._dtype(model)
    chosen: Counter[tuple[str, str]] = Counter()
    for name, layer in quantized_modules(model):
        if layer.weight.device.type == "meta":
            continue  # offloaded: chosen at the first call
        try:
            selection = layer.prepare(dtype)
        except KernelError as error:
            raise KernelError(f"{name}: {error.problem}", error.fix) from error
        chosen[selection.kernel.name, selection.reason] += 1
    parts = [f"{count} x {kernel} ({reason})" for (kernel, reason), count in chosen.most_common()]
    logger.info("hf-quant kernels: %s", "; ".join(parts) or "none chosen yet (all layers are offloaded)")


# --- registration ----------------------------------------------------------------------------------------------------


def _dispatch(method: str) -> Callable[..., HfQuantizer]:
    """A stand-in for a stock quantizer class: our runtime where it can hold the checkpoint, else the stock one."""
    stock, format_name = _replaced[method], _STOCK[method]

    def make(quantization_config: QuantizationConfigMixin, **kwargs: Any) -> HfQuantizer:
        if kwargs.get("pre_quantized", True) and not getattr(quantization_config, "dequantize", False):
            try:
                return _StockRuntime(quantization_config, format_name, **kwargs)
            except FormatError as error:
                logger.info("%s checkpoint left to its stock quantizer: %s", method, error.problem)
        found: HfQuantizer = stock(quantization_config, **kwargs)
        return found

    return make


def register() -> None:
    """Make transformers know ``HfQuantConfig``; safe to call again."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(HfQuantConfig)
        auto.register_quantizer(QUANT_METHOD)(HfQuantQuantizer)
        # lets `dequantize` and `kernel` be given when a checkpoint is loaded
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, HfQuantConfig)


def enable() -> None:
    """Load compressed-tensors and bitsandbytes 4-bit checkpoints on our runtime, where it supports them."""
    for method in _STOCK:
        if method not in _replaced:
            _replaced[method] = auto.AUTO_QUANTIZER_MAPPING[method]
            auto.AUTO_QUANTIZER_MAPPING[method] = _dispatch(method)


def disable() -> None:
    """Give compressed-tensors and bitsandbytes checkpoints back to their stock quantizers."""
    while _replaced:
        method, stock = _replaced.popitem()
        auto.AUTO_QUANTIZER_MAPPING[method] = stock


def enable_by_default() -> None:
    """At import: :func:`enable`, unless the environment variable HF_QUANT_RUNTIME is ``stock``."""
    register()
    if os.environ.get(RUNTIME_VARIABLE, "hf_quant") != "stock":
        enable()
