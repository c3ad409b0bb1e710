"""The transformers plugin: quantize on load, load what was quantized on our own runtime, save in stock formats."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_quant.checkpoint import check_directory
from hf_quant.config import QUANT_METHOD, HfQuantConfig
from hf_quant.errors import CheckpointError, FormatError, HfQuantError
from hf_quant.formats import FORMATS, Format, bitsandbytes, compressed_tensors
from hf_quant.grids import Scheme
from hf_quant.integrations.conversions import Decode, Quantize, is_ours
from hf_quant.integrations.published import model_dtype, prepare, publish
from hf_quant.integrations.stored import StoredModule, scale_dtype, stored_modules
from hf_quant.kernels import registry
from hf_quant.nn.linear import QuantLinear
from hf_quant.nn.swap import float_shape, put_empty, put_float, put_quantized, put_vectors, quantized_modules, untie
from hf_quant.plan import Plan, is_linear, make_plan, plan_of_checkpoint
from hf_quant.provenance import KEY
from hf_quant.quantize.weight import quantize_weight

if TYPE_CHECKING:  # transformers imports its quantizers, and with them this file, while it makes this class
    from transformers import PretrainedConfig, PreTrainedModel

    from hf_quant.integrations.calibrated import Calibrated

logger = logging.getLogger("hf_quant")
RUNTIME_VARIABLE = "HF_QUANT_RUNTIME"
_kernel: ContextVar[str] = ContextVar("hf_quant_kernel", default=registry.AUTO)
_activations: ContextVar[str] = ContextVar("hf_quant_activations", default=registry.FLOAT)
_STOCK = {compressed_tensors.NAME: compressed_tensors.NAME, "bitsandbytes_4bit": bitsandbytes.NAME}
_replaced: dict[str, Any] = {}


@contextmanager
def requested_kernel(name: str, activations: str = registry.FLOAT) -> Iterator[None]:
    """Every layer made inside asks for this kernel and these activations; raises ConfigError for an unknown name."""
    token = _kernel.set(registry.check_name(name))
    mode = _activations.set(registry.check_activations(activations))
    try:
        yield
    finally:
        _activations.reset(mode)
        _kernel.reset(token)


class _Runtime(HfQuantizer):
    """What both quantizers share: layers to swap, errors that survive transformers' loader, saving, expanding."""

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

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        # the first hook that knows the directory: without a dtype in config.json, transformers reads one from a shard
        # that it finds through the index, before the model exists
        name = getattr(config, "name_or_path", "")
        if name and any(Path(name).glob("*.safetensors*")):
            self._check_files(config, None)
        return super().update_attn_implementation(config)

    def _check_files(self, config: PretrainedConfig, checkpoint_files: list[str] | None) -> None:
        """Validate index and headers before transformers opens a shard (it joins the index's names unchecked)."""
        name = getattr(config, "name_or_path", "")
        if name and Path(name).is_dir():
            directory = Path(name)
        elif checkpoint_files:
            directory = Path(checkpoint_files[0]).parent
        else:
            return
        if (directory / "config.json").exists():
            check_directory(directory)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._check_loaded()
        conversions = getattr(model, "_weight_conversions", None) or []
        # our own conversions are undone by get_state_dict_and_metadata, with names that transformers cannot revert
        model._weight_conversions = [c for c in conversions if not is_ours(c)]  # type: ignore[assignment]
        if getattr(self.quantization_config, "dequantize", False):
            put_float(model, model_dtype(model))
            self.remove_quantization_config(model)
            return model
        publish(model, self)
        prepare(model)
        return model

    def _check_loaded(self) -> None:
        if self.failure is not None:
            raise self.failure

    def note(self, error: HfQuantError) -> None:
        """Keep the first error of a conversion, to be raised after loading."""
        if self.failure is None:
            self.failure = error

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        put_float(model, model_dtype(model, dtype))
        model.config.__dict__.pop(KEY, None)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        state = model.state_dict()
        dtype = model_dtype(model)
        for name, layer in quantized_modules(model):
            for leaf in [leaf for leaf in layer._parameters if leaf != "bias"]:
                state.pop(f"{name}.{leaf}", None)
            # an offloaded weight is read back: transformers would look for it under the name that it has on disk
            offloaded = layer.weight.device.type == "meta"
            with align_module_device(layer, torch.device("cpu")) if offloaded else nullcontext():
                encoded = self.format.encode(layer.quantized(), dtype=dtype, name=name)
            state.update({f"{name}.{suffix}": tensor for suffix, tensor in encoded.items()})
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

    def __init__(self, quantization_config: HfQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.done: set[str] = set()  # layers whose float weight was found and quantized
        self.calibrated: Calibrated | None = None  # the layers of a calibrated run that is over
        self.deferred = False  # it has yet to begin, when the float model is loaded
        self.data: dict[str, Any] | None = None  # what it was calibrated on
        self.results: list[dict[str, Any]] = []  # what it says about each layer
        self.tuned = False  # scales, norms and biases were tuned, and the result was kept

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self._check_files(model.config, kwargs.get("checkpoint_files"))
        self.plan = make_plan(model, self.quantization_config)
        self.format_name = self.plan.format
        if self.quantization_config.calibration is not None:
            # imported here: it needs transformers' models, and transformers imports this file while it makes them
            from hf_quant.integrations.calibrated import ready

            self.calibrated = ready()
            self.deferred = self.calibrated is None
            if self.deferred:
                return  # the float model is loaded first: a calibrated run cannot begin inside of transformers' loader
        # a tied weight has no tensor of its own in the files: it is quantized when its partner has been loaded
        schemes = {q.name: q.scheme for q in self.plan.quantized if q.scheme and not q.untied_from}
        self._methods = {layer.name: layer.method for layer in self.plan.quantized}
        put_empty(model, schemes, getattr(torch, self.plan.scale_dtype), *self._requested())

    def _requested(self) -> tuple[str, str]:
        """The kernel and the activations to ask for: the config's own where it says more than its default."""
        kernel, activations = self.quantization_config.kernel, self.quantization_config.activations
        return (
            _kernel.get() if kernel == registry.AUTO else kernel,
            _activations.get() if activations == registry.FLOAT else activations,
        )

    def _check_loaded(self) -> None:
        super()._check_loaded()
        assert self.plan is not None
        missing = [layer.name for layer in self.plan.quantized if layer.name not in self.done]
        if missing:
            raise CheckpointError(
                f"{missing[0]}.weight is not in the checkpoint ({len(missing)} such layers).",
                "repair the checkpoint; layers that are meant to start from random values belong into skip.",
            )

    def _calibrate(self, model: PreTrainedModel) -> None:
        """Quantize the layers of the loaded float model, by the float32 weights of its files."""
        from hf_quant.integrations.calibrated import run_on_files

        assert self.plan is not None
        config = model.config
        self.calibrated = run_on_files(
            config.name_or_path,
            type(model),
            self.plan,
            self.quantization_config,
            revision=getattr(config, "_commit_hash", None),
            trust_remote_code=type(model).__module__.startswith("transformers_modules"),
        )
        for layer in self.plan.quantized:
            device = model.get_parameter(f"{layer.name}.weight").device
            tensor = self.calibrated.journal.tensor(layer.name).to(device)
            put_quantized(model, layer.name, tensor, *self._requested())
            self.done.add(layer.name)

    @torch.no_grad()
    def _quantize_tied(self, model: PreTrainedModel) -> None:
        """Layers whose float weight is that of the embedding: they get a weight of their own, and it stays in float."""
        assert self.plan is not None
        for layer in self.plan.quantized:
            if not layer.untied_from or layer.scheme is None:
                continue
            if layer.name not in self.done:
                weight, scales = model.get_parameter(layer.untied_from).detach(), getattr(torch, self.plan.scale_dtype)
                if self.calibrated is not None:
                    tensor = self.calibrated.journal.tensor(layer.name).to(weight.device)
                else:
                    tensor = quantize_weight(weight, layer.scheme, layer.method, scale_dtype=scales, name=layer.name)
                put_quantized(model, layer.name, tensor, *self._requested())
                self.done.add(layer.name)
            untie(model, layer.name)

    def note_calibrated(self, calibrated: Calibrated) -> None:
        """Keep what is recorded of a calibrated run."""
        self.data, self.results = calibrated.data.record(), calibrated.journal.results()
        self.tuned = calibrated.tuned

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.deferred:
            self._calibrate(model)
        if self.failure is None:
            self._quantize_tied(model)
        if self.calibrated is not None and self.failure is None:
            self.note_calibrated(self.calibrated)
            put_vectors(model, self.calibrated.journal.floats())
            self.calibrated.close()
            self.calibrated = None
        return super()._process_model_after_weight_loading(model, **kwargs)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, leaf = get_module_from_name(model, param_name)
        return not self.pre_quantized and isinstance(module, QuantLinear) and leaf == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self)

    def method(self, name: str) -> str:
        return self._methods[name]


class StockRuntime(_Runtime):
    """A checkpoint in a stock format, kept packed on our kernels."""

    def __init__(
        self,
        quantization_config: QuantizationConfigMixin,
        format_name: str,
        stock: Callable[..., HfQuantizer],
        **kwargs: Any,
    ) -> None:
        super().__init__(quantization_config, **kwargs)
        self.format_name = format_name
        self.stock = stock
        self.serialized_names = {"weight": list(self.format.SUFFIXES)}
        # through JSON, because stock config classes hold enums and tuples where the file holds text and lists
        self.resolver = self.format.read_config(json.loads(json.dumps(quantization_config.to_dict())))

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        self._check_files(model.config, files)
        stored = stored_modules(model, files, self.format.SUFFIXES)
        try:
            schemes = self._schemes(model, stored)
        except FormatError as error:
            if hasattr(model.config, KEY):
                raise  # a checkpoint of ours is damaged
            logger.info("%s left to its stock quantizer: %s", model.config.name_or_path, error.problem)
            self._hand_over(model, **kwargs)
            return
        dtype = model_dtype(model, kwargs.get("dtype"))
        scales = scale_dtype((stored or {}).values(), compressed_tensors.SCALE) or dtype
        self.plan = plan_of_checkpoint(model, schemes, self.format_name, str(scales).removeprefix("torch."))
        put_empty(model, schemes, scales, _kernel.get(), _activations.get())

    def _hand_over(self, model: PreTrainedModel, **kwargs: Any) -> None:
        stock = self.stock(self.quantization_config, pre_quantized=self.pre_quantized)
        # only the headers told that we cannot run this checkpoint, and by now transformers holds this object
        self.__class__, self.__dict__ = type(stock), vars(stock)
        stock.validate_environment(device_map=kwargs.get("device_map"), weights_only=True)
        stock._process_model_before_weight_loading(model, **kwargs)

    def _schemes(self, model: nn.Module, stored: Mapping[str, StoredModule] | None) -> dict[str, Scheme]:
        found: dict[str, Scheme] = {}
        for name, module in model.named_modules():
            scheme = self._scheme(name, module, stored) if name and is_linear(module) else None
            if scheme is not None:
                found[name] = scheme
        return found

    def _scheme(self, name: str, module: nn.Module, stored: Mapping[str, StoredModule] | None) -> Scheme | None:
        """The file says whether a module is packed (a new head is not), the config how.

        Raises:
            FormatError: the two disagree, or a layout that our kernels do not hold.
        """
        rows, columns = float_shape(module)
        kinds = (type(module).__name__,)
        if stored is None:
            return self.resolver(name, columns, rows, kinds)
        found = stored.get(name)
        if found is None or not found.is_packed:
            return None
        if self.format_name == bitsandbytes.NAME:
            return bitsandbytes.scheme_from_shapes(found.shapes, columns, rows, name=name)
        scheme = self.resolver(name, columns, rows, kinds) or self.resolver(found.name, columns, rows, kinds)
        if scheme is None:
            raise FormatError(
                f"{found.name} is packed, but the quantization_config leaves it in float.",
                "the config and the files belong to different checkpoints.",
            )
        return scheme

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": Decode}


# --- registration ----------------------------------------------------------------------------------------------------


def _dispatch(method: str) -> Callable[..., HfQuantizer]:
    """A stand-in for a stock quantizer class: our runtime where it can hold the checkpoint, else the stock one."""
    stock, format_name = _replaced[method], _STOCK[method]

    def make(quantization_config: QuantizationConfigMixin, **kwargs: Any) -> HfQuantizer:
        if kwargs.get("pre_quantized", True) and not getattr(quantization_config, "dequantize", False):
            try:
                return StockRuntime(quantization_config, format_name, stock, **kwargs)
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
        # lets `dequantize`, `kernel` and `activations` be given when a checkpoint is loaded
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


enable_by_default()
