"""The transformers plugin: quantize on load, save in stock formats; what all our quantizers share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_quant.checkpoint import check_directory
from hf_quant.config import QUANT_METHOD, HfQuantConfig
from hf_quant.errors import CheckpointError, HfQuantError
from hf_quant.formats import FORMATS, Format
from hf_quant.integrations.conversions import Quantize, is_ours
from hf_quant.integrations.experts import ExpertsLoader
from hf_quant.integrations.published import model_dtype, prepare, publish
from hf_quant.kernels import registry
from hf_quant.nn.embedding import SharedHead
from hf_quant.nn.experts import SplitExperts
from hf_quant.nn.packed import PackedWeight
from hf_quant.nn.splitting import split_experts
from hf_quant.nn.swap import (
    put_empty,
    put_float,
    put_quantized,
    put_vectors,
    quantized_modules,
    share_tables,
    shared_heads,
    untie,
)
from hf_quant.plan import Plan, make_plan
from hf_quant.provenance import KEY
from hf_quant.quantize.weight import quantize_weight
from hf_quant.tensor import QuantizedTensor

if TYPE_CHECKING:  # transformers imports its quantizers, and with them this file, while it makes this class
    from transformers import PretrainedConfig, PreTrainedModel

    from hf_quant.integrations.calibrated import Calibrated

logger = logging.getLogger("hf_quant")
_kernel: ContextVar[str] = ContextVar("hf_quant_kernel", default=registry.AUTO)
_activations: ContextVar[str] = ContextVar("hf_quant_activations", default=registry.FLOAT)


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


def requested() -> tuple[str, str]:
    """The kernel and the activations that layers made now ask for."""
    return _kernel.get(), _activations.get()


class Runtime(ExpertsLoader):
    """What our quantizers share: layers to swap, errors that survive transformers' loader, saving, expanding."""

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
            self.put_together(model)
            self.remove_quantization_config(model)
            return model
        self.settle(model)
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
        self.put_together(model)
        model.config.__dict__.pop(KEY, None)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        state = model.state_dict()
        dtype = model_dtype(model)
        for name, layer in quantized_modules(model):
            for leaf in layer.packed_parameters():
                state.pop(f"{name}.{leaf}", None)
            # an offloaded weight is read back: transformers would look for it under the name that it has on disk
            offloaded = layer.weight.device.type == "meta"
            with align_module_device(layer, torch.device("cpu")) if offloaded else nullcontext():
                encoded = self.format.encode(layer.quantized(), dtype=dtype, name=name)
            state.update({f"{name}.{suffix}": tensor for suffix, tensor in encoded.items()})
        for name, _ in shared_heads(model):
            state.pop(f"{name}.weight", None)  # the table is there under the name of the embedding
        return state, {}

    def is_serializable(self) -> bool:
        if self.plan is not None:
            self.published_config(None)  # raises FormatError for what the format cannot hold
        return True

    def published_config(self, model: nn.Module | None) -> dict[str, Any]:
        """The stock ``quantization_config`` of this model; raises FormatError when its format cannot hold it."""
        assert self.plan is not None
        dtype = None if model is None else model_dtype(model)
        return self.format.quantization_config(self.plan, dtype=dtype)

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return not self.has_split_experts  # which layers run is decided token by token


class HfQuantQuantizer(Runtime):
    """``quantization_config=HfQuantConfig(...)``: a float checkpoint is quantized tensor by tensor as it is read."""

    quantization_config: HfQuantConfig

    def __init__(self, quantization_config: HfQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.done: set[str] = set()  # layers whose float weight was found and quantized
        self.heads: dict[str, QuantizedTensor] = {}  # what the files hold for layers that share a table
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
        split_experts(model, schemes)
        self.await_fused(model)
        put_empty(model, schemes, getattr(torch, self.plan.scale_dtype), *self._requested())
        _await_floats(model, model_dtype(model, kwargs.get("dtype")))
        share_tables(model, self.plan.shares)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        module, leaf = get_module_from_name(model, param_name)
        if isinstance(module, (PackedWeight, SharedHead)) and leaf == "weight":
            return 1  # bytes, whatever the dtype of the placeholder
        return float(super().param_element_size(model, param_name, param))

    def _requested(self) -> tuple[str, str]:
        """The kernel and the activations to ask for: the config's own where it says more than its default."""
        kernel, activations = self.quantization_config.kernel, self.quantization_config.activations
        asked = requested()
        return (
            asked[0] if kernel == registry.AUTO else kernel,
            asked[1] if activations == registry.FLOAT else activations,
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
        split_experts(model, [layer.name for layer in self.plan.quantized])
        for layer in self.plan.quantized:
            tensor = self.quantize(layer.name, model.get_parameter(f"{layer.name}.weight").detach())
            put_quantized(model, layer.name, tensor, *self._requested())
        share_tables(model, self.plan.shares)

    def quantize(self, name: str, weight: torch.Tensor) -> QuantizedTensor:
        """A planned layer from its float weight, as its class stores it: what a calibrated run says, else data-free."""
        assert self.plan is not None
        layer = self.plan.layer(name)
        self.done.add(name)
        if self.calibrated is not None and name in self.calibrated.journal:
            return self.calibrated.journal.tensor(name).to(weight.device)
        assert layer.scheme is not None
        return quantize_weight(
            weight.t().contiguous() if layer.kind == "Conv1D" else weight,
            layer.scheme,
            layer.method,
            scale_dtype=getattr(torch, self.plan.scale_dtype),
            name=name,
        )

    def quantize_head(self, name: str, weight: torch.Tensor) -> None:
        """A weight in the files for a layer that shares a table: kept to be compared with the table."""
        assert self.plan is not None
        table = self.plan.layer(self.plan.shares[name])
        assert table.scheme is not None
        scales = getattr(torch, self.plan.scale_dtype)
        self.heads[name] = quantize_weight(weight, table.scheme, table.method, scale_dtype=scales, name=name)

    def _compare_heads(self, model: PreTrainedModel) -> None:
        """Raise CheckpointError where the files hold a head of their own for a layer that shares a table."""
        for name, head in self.heads.items():
            shared = model.get_submodule(name)
            table = shared.table if isinstance(shared, SharedHead) else None
            if table is None or not torch.equal(head.packed, table.quantized().packed):
                raise CheckpointError(
                    f"{name}.weight differs from the embedding that config.json ties it to.",
                    "set tie_word_embeddings to false in config.json.",
                )
        self.heads.clear()

    @torch.no_grad()
    def _quantize_tied(self, model: PreTrainedModel) -> None:
        """Layers whose float weight is that of the embedding: they get a weight of their own, and it stays in float."""
        assert self.plan is not None
        for layer in self.plan.quantized:
            if not layer.untied_from or layer.scheme is None:
                continue
            if layer.name not in self.done:
                tensor = self.quantize(layer.name, model.get_parameter(layer.untied_from).detach())
                put_quantized(model, layer.name, tensor, *self._requested())
            untie(model, layer.name)

    def take_calibrated(self, model: nn.Module) -> None:
        """Take the rest of a calibrated run, if there is one: norms and biases, and what is recorded of it."""
        if self.calibrated is None:
            return
        self.data, self.results = self.calibrated.data.record(), self.calibrated.journal.results()
        self.tuned = self.calibrated.tuned
        put_vectors(model, self.calibrated.journal.floats())
        self.calibrated.close()
        self.calibrated = None

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.deferred:
            self._calibrate(model)
        if self.failure is None:
            self._quantize_tied(model)
            self._compare_heads(model)
        if self.failure is None:
            self.take_calibrated(model)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, leaf = get_module_from_name(model, param_name)
        if self.pre_quantized or isinstance(module, SplitExperts):
            return not self.pre_quantized and leaf in module.layout.parameters
        return isinstance(module, (PackedWeight, SharedHead)) and leaf == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self)


def _await_floats(model: nn.Module, dtype: torch.dtype) -> None:
    """Give empty packed weights a float dtype until they are filled.

    Before release 5.23 transformers casts what it reads to the dtype of the parameter that it is for, also where that
    is quantized afterwards: every weight would be cast to bytes.
    """
    for _, layer in quantized_modules(model):
        layer.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)


def register() -> None:
    """Make transformers know ``HfQuantConfig``; safe to call again."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(HfQuantConfig)
        auto.register_quantizer(QUANT_METHOD)(HfQuantQuantizer)
        # lets `dequantize`, `kernel` and `activations` be given when a checkpoint is loaded
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, HfQuantConfig)


register()
