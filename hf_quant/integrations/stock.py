"""Stock checkpoints on our kernels: compressed-tensors, bitsandbytes 4-bit, GPTQ and AWQ, where we support them.

transformers looks a checkpoint's quantizer up by its method. :func:`enable` puts a stand-in there that decides for
every checkpoint: our runtime when config, files and device allow it, else the stock quantizer and one line in the log
that says why. :func:`disable` puts the stock classes back.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_quant.errors import CheckpointError, DependencyError, FormatError
from hf_quant.formats import Refined, awq, bitsandbytes, compressed_tensors, format_of, gptq
from hf_quant.grids import Scheme
from hf_quant.integrations.conversions import Decode
from hf_quant.integrations.published import model_dtype
from hf_quant.integrations.stored import StoredModule, scale_dtype, stored_modules
from hf_quant.integrations.transformers import Runtime, register, requested
from hf_quant.nn.embedding import is_embedding
from hf_quant.nn.swap import float_shape, put_empty, share_tables, tied_to, untie
from hf_quant.plan import Plan, is_linear, plan_of_checkpoint
from hf_quant.provenance import KEY

if TYPE_CHECKING:  # transformers imports its quantizers, and with them this file, while it makes this class
    from transformers import PreTrainedModel

logger = logging.getLogger("hf_quant")
RUNTIME_VARIABLE = "HF_QUANT_RUNTIME"
# what transformers calls the method -> the package that its stock quantizer needs
_METHODS = {
    compressed_tensors.NAME: "compressed_tensors",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",  # LLM.int8, which is never ours: only to say so
    gptq.METHOD: "gptqmodel",
    awq.NAME: "gptqmodel",
}
_ACCELERATED = (gptq.METHOD, awq.NAME)  # their stock kernels are the better ones away from the CPU
_replaced: dict[str, Any] = {}
_replaced_configs: dict[str, Any] = {}


class StockRuntime(Runtime):
    """A checkpoint in a stock format, kept packed on our kernels."""

    def __init__(
        self,
        quantization_config: QuantizationConfigMixin,
        method: str,
        stock: Callable[..., HfQuantizer],
        **kwargs: Any,
    ) -> None:
        super().__init__(quantization_config, **kwargs)
        self.stock = stock
        self.method = method
        # through JSON, because stock config classes hold enums and tuples where the file holds text and lists
        self.loaded: dict[str, Any] = json.loads(json.dumps(quantization_config.to_dict()))
        self.format_name = format_of(self.loaded)
        self.resolver = self.format.read_config(self.loaded)
        # what transformers' loader calls the tensors -> the suffix; older releases take the first that matches
        suffixes = sorted(self.format.SUFFIXES, key=len, reverse=True)
        self.patterns = {s if s.startswith("weight") else rf"(?<=\.){s}$": s for s in suffixes}
        self.serialized_names = {"weight": list(self.patterns)}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        reason = _elsewhere(self.method, kwargs.get("device_map"))
        if reason is None:
            super().validate_environment(*args, **kwargs)
        else:
            _log(self.method, reason)
            self._become_stock()
            self.validate_environment(*args, **kwargs)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        self._check_files(model.config, files)
        stored = stored_modules(model, files, self.format.SUFFIXES)
        try:
            ordered: set[str] = set()
            schemes = self._schemes(model, stored, ordered)
        except FormatError as error:
            self.leave_to_stock(model)
            if hasattr(model.config, KEY):
                raise  # a checkpoint of ours is damaged
            _log(model.config.name_or_path, error.problem)
            self._become_stock()
            self.validate_environment(device_map=kwargs.get("device_map"), weights_only=True)
            self._process_model_before_weight_loading(model, **kwargs)
            return
        self.keep_split(model, schemes)
        scales = scale_dtype((stored or {}).values(), self.format.SCALE) or model_dtype(model, kwargs.get("dtype"))
        self.plan = plan_of_checkpoint(model, schemes, self.format_name, str(scales).removeprefix("torch."))
        for name in schemes:
            if tied_to(model, name) in schemes:
                untie(model, name)  # the files hold both
        put_empty(model, schemes, scales, *requested(), ordered)
        _check_tables(kwargs.get("device_map"), self.plan.shares)
        share_tables(model, self.plan.shares)

    def read_plan(self, skeleton: PreTrainedModel, files: Sequence[str]) -> Plan:
        """The plan that safetensors files hold; nothing is loaded, and no module of the skeleton is replaced.

        Raises:
            FormatError: files and config disagree, or a layout that our kernels do not hold.
        """
        self._convert_model_for_quantization(skeleton)
        stored = stored_modules(skeleton, files, self.format.SUFFIXES) or {}
        schemes = self._schemes(skeleton, stored, set())
        self.keep_split(skeleton, schemes)
        scales = scale_dtype(stored.values(), self.format.SCALE) or model_dtype(skeleton)
        return plan_of_checkpoint(skeleton, schemes, self.format_name, str(scales).removeprefix("torch."))

    def _become_stock(self) -> None:
        """transformers holds this object already: from here on it is a stock quantizer."""
        stock = self.stock(self.quantization_config, pre_quantized=self.pre_quantized)
        self.__class__, self.__dict__ = type(stock), vars(stock)

    def _schemes(
        self, model: PreTrainedModel, stored: Mapping[str, StoredModule] | None, ordered: set[str]
    ) -> dict[str, Scheme]:
        """The scheme of every packed module; names of those with reordered columns go into ``ordered``."""
        self._check_names(model, stored)
        found: dict[str, Scheme] = {}
        for name, module in model.named_modules():
            ours = name and (is_linear(module) or is_embedding(module))
            scheme, reordered = self._scheme(name, module, stored) if ours else (None, False)
            if scheme is not None:
                found[name] = scheme
                if reordered:
                    ordered.add(name)
        return found

    def _check_names(self, model: PreTrainedModel, stored: Mapping[str, StoredModule] | None) -> None:
        """Raise FormatError for packed tensors that no linear layer takes, and for names that would be confused."""
        modules = dict(model.named_modules())
        for name, found in (stored or {}).items():
            if not found.is_packed or name in modules:
                continue
            parent = name
            while parent and parent not in modules:
                parent = parent.rpartition(".")[0]
            # a head that this class of model does not have is left out; parts of what it has otherwise are not
            if parent and any(True for _ in modules[parent].parameters(recurse=False)):
                raise FormatError(
                    f"{found.name} is packed, and the model has {parent} as a {type(modules[parent]).__name__}.",
                    "load it with stock transformers.",
                )
        ours = [suffix for suffix in self.format.SUFFIXES if not suffix.startswith("weight")]
        for key in model.state_dict():
            if any(key.endswith(f".{suffix}") for suffix in ours):
                raise FormatError(f"the model has a parameter {key}, which the format has too.")
        if self.format_name == awq.NAME and model.config.model_type in _scaled_activations():
            raise FormatError(f"AWQ scales the activations of {model.config.model_type} models.")

    def _scheme(
        self, name: str, module: nn.Module, stored: Mapping[str, StoredModule] | None
    ) -> tuple[Scheme | None, bool]:
        """The file says whether a module is packed (a new head is not), the config how; and whether it is reordered.

        Raises:
            FormatError: the two disagree, or a layout that our kernels do not hold.
        """
        rows, columns = float_shape(module)
        kinds = ("Embedding",) if is_embedding(module) else _kinds(module)
        refined = isinstance(self.format, Refined)
        if stored is None:
            if refined:
                raise FormatError(
                    f"a state dict was given, and {self.format_name} layers are known by their files.", ""
                )
            return self.resolver(name, columns, rows, kinds), False
        found = stored.get(name)
        if found is None or not found.is_packed:
            return None, False
        if self.format_name == bitsandbytes.NAME:
            return bitsandbytes.scheme_from_shapes(found.shapes, columns, rows, name=name), False
        scheme = self.resolver(name, columns, rows, kinds) or self.resolver(found.name, columns, rows, kinds)
        if scheme is None:
            raise FormatError(
                f"{found.name} is packed, but the quantization_config leaves it in float.",
                "the config and the files belong to different checkpoints.",
            )
        if isinstance(self.format, Refined):
            return self.format.refine(scheme, found.read, (rows, columns), name)
        return scheme, False

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": Decode}

    def get_weight_conversions(self) -> list[Any]:
        """The same as a list: before release 5.21 transformers asks for this alone."""
        return [WeightConverter(names, leaf, [Decode(self)]) for leaf, names in self.serialized_names.items()]

    def published_config(self, model: nn.Module | None) -> dict[str, Any]:
        if self.method in _ACCELERATED and self.format_name == format_of(self.loaded):
            return self.loaded  # says what its tensors do not (how it was made, which blocks)
        return super().published_config(model)


def _check_tables(device_map: object, shares: Mapping[str, str]) -> None:
    """Raise CheckpointError where a table that a head shares would be on disk: it is there for one of the two only."""
    placed = device_map if isinstance(device_map, dict) else {}
    for head, table in shares.items():
        parts = table.split(".")
        names = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
        if next((placed[name] for name in names if name in placed), None) == "disk":
            raise CheckpointError(
                f"device_map places {table} on disk, and {head} computes with its table.", f"keep {table} in memory."
            )


# --- registration ----------------------------------------------------------------------------------------------------


class StoredConfig(QuantizationConfigMixin):
    """The config of a checkpoint as it is, where the stock class needs a package that is not installed."""

    def __init__(self, method: str, stored: Mapping[str, Any]) -> None:
        self.quant_method = method
        self.stored = dict(stored)

    def to_dict(self) -> dict[str, Any]:
        """As in config.json."""
        return dict(self.stored)


def _make_stock(
    stock: Callable[..., HfQuantizer], method: str, quantization_config: QuantizationConfigMixin, **kwargs: Any
) -> HfQuantizer:
    """transformers' own quantizer of a method; raises DependencyError without the package that it needs."""
    package = _METHODS[method]
    if not _installed(package):
        name = package.replace("_", "-")
        raise DependencyError(f"the stock quantizer of {method} needs {name}.", f"pip install {name}.")
    return stock(quantization_config, **kwargs)


def _dispatch(method: str) -> Callable[..., HfQuantizer]:
    """A stand-in for a stock quantizer class: our runtime where it can hold the checkpoint, else the stock one."""
    make_stock = partial(_make_stock, _replaced[method], method)

    def make(quantization_config: QuantizationConfigMixin, **kwargs: Any) -> HfQuantizer:
        if kwargs.get("pre_quantized", True) and not getattr(quantization_config, "dequantize", False):
            try:
                return StockRuntime(quantization_config, method, make_stock, **kwargs)
            except FormatError as error:
                _log(f"{method} checkpoint", error.problem)
        return make_stock(quantization_config, **kwargs)

    return make


def _config_reader(method: str) -> Any:
    class Reader:
        """A stand-in for a config class that cannot be made without its package."""

        @staticmethod
        def from_dict(stored: Mapping[str, Any], **kwargs: Any) -> StoredConfig:
            return StoredConfig(method, stored)

    return Reader


def enable() -> None:
    """Load compressed-tensors, bitsandbytes 4-bit, GPTQ and AWQ checkpoints on our runtime, where it supports them."""
    for method, package in _METHODS.items():
        if method in _replaced:
            continue
        _replaced[method] = auto.AUTO_QUANTIZER_MAPPING[method]
        auto.AUTO_QUANTIZER_MAPPING[method] = _dispatch(method)
        if method not in _ACCELERATED and not _installed(package):  # their config classes need the package, too
            _replaced_configs[method] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method]
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _config_reader(method)


def disable() -> None:
    """Give these checkpoints back to their stock quantizers."""
    while _replaced:
        method, stock = _replaced.popitem()
        auto.AUTO_QUANTIZER_MAPPING[method] = stock
    while _replaced_configs:
        method, stock = _replaced_configs.popitem()
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = stock


def enable_by_default() -> None:
    """At import: :func:`enable`, unless the environment variable HF_QUANT_RUNTIME is ``stock``."""
    register()
    if os.environ.get(RUNTIME_VARIABLE, "hf_quant") != "stock":
        enable()


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _kinds(module: nn.Module) -> tuple[str, ...]:
    """What a config may call a linear layer: by its class (Falcon has one of its own), and by what it is."""
    own = type(module).__name__
    return ("Linear", own) if isinstance(module, nn.Linear) else (own,)


def _log(name: str, reason: str) -> None:
    logger.warning("%s left to its stock quantizer: %s", name, reason)


def _elsewhere(method: str, device_map: Any) -> str | None:
    """Why a checkpoint of this method is not for our kernels by the device that it goes to; None when it is."""
    if method not in _ACCELERATED or device_map is None:
        return None
    if isinstance(device_map, str):  # auto, balanced ...: the accelerator, where there is one
        away = device_map not in ("cpu", "disk") and torch.accelerator.is_available()
    else:
        places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        away = any(str(place).split(":")[0] not in ("cpu", "disk") for place in places)
    return f"device_map={device_map!r} is not the CPU." if away else None


def _scaled_activations() -> Mapping[str, Any]:
    from transformers.integrations.awq import AWQ_SCALES_MAPPINGS

    found: Mapping[str, Any] = AWQ_SCALES_MAPPINGS
    return found


enable_by_default()
