"""What a quantized model says of itself: its stock config, its provenance, and the kernels that run it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_quant.config import QUANT_METHOD, HfQuantConfig
from hf_quant.errors import FormatError, KernelError
from hf_quant.nn.fused import fuse
from hf_quant.nn.swap import quantized_modules
from hf_quant.provenance import KEY, STOCK, make_provenance

if TYPE_CHECKING:  # transformers imports its quantizers, and with them this file, while it makes this class
    from transformers import PreTrainedModel

    from hf_quant.integrations.transformers import Runtime

logger = logging.getLogger("hf_quant")


class PublishedConfig(QuantizationConfigMixin):
    """The stock ``quantization_config`` of a model in memory: what ``save_pretrained`` writes to config.json."""

    def __init__(self, published: Mapping[str, Any]) -> None:
        self.published = dict(published)
        self.quant_method = self.published["quant_method"]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.published)


def model_dtype(model: nn.Module, dtype: torch.dtype | str | None = None) -> torch.dtype:
    """The given dtype, else the model's; either may be a string (save_pretrained leaves one in ``config.dtype``)."""
    found = dtype or getattr(model.config, "dtype", None) or torch.float32
    return getattr(torch, found.removeprefix("torch.")) if isinstance(found, str) else found


def publish(model: PreTrainedModel, quantizer: Runtime) -> None:
    """Give a quantized model the config that describes it to stock loaders, and its provenance."""
    config, plan = model.config, quantizer.plan
    assert plan is not None
    if isinstance(quantizer.quantization_config, HfQuantConfig):
        source = getattr(config, "_name_or_path", None) or None
        revision = getattr(config, "_commit_hash", None)
        data = getattr(quantizer, "data", None)
        tuned = getattr(quantizer, "tuned", False)
        made = make_provenance(plan, quantizer.quantization_config, source, revision, data, tuned)
        setattr(config, KEY, {**made, STOCK: quantizer.format.stock_loading(plan)})
    try:
        # written anew for a checkpoint that was loaded, too: its config class keeps neither our marker nor, for a model
        # of another class, the right names
        published = quantizer.published_config(model)
    except FormatError as error:
        # it runs, but it cannot be saved as it is: is_serializable() says so before anything is written
        logger.info("this model cannot be saved: %s", error)
        published = {"quant_method": QUANT_METHOD}
    config.quantization_config = PublishedConfig(published)
    _push_with_card()
    model.quantization_method = QUANT_METHOD
    model.is_quantized = True


def _push_with_card() -> None:
    """Let ``push_to_hub`` of models on our runtime publish as ``hf-quant push`` does; others keep transformers' own.

    Replaced in the class, once: a method of each model would be a cycle that keeps its memory from being freed.
    """
    from transformers import PreTrainedModel

    stock = PreTrainedModel.push_to_hub
    if hasattr(stock, "publishes_quantized"):
        return

    @wraps(stock)
    def push_to_hub(self: PreTrainedModel, repo_id: str, **options: Any) -> Any:
        adapters = hasattr(self, "peft_config") or getattr(self, "_hf_peft_config_loaded", False)
        if adapters or not any(True for _ in quantized_modules(self)):
            return stock(self, repo_id, **options)
        from hf_quant.hub import push_model

        return push_model(self, repo_id, **options)

    push_to_hub.publishes_quantized = True  # type: ignore[attr-defined]
    PreTrainedModel.push_to_hub = push_to_hub


def prepare(model: nn.Module) -> None:
    """Choose a kernel for every layer now, say in one log line which ones run, and fuse the decoders that can be.

    Raises:
        KernelError: a kernel was asked for by name that cannot run a layer.
    """
    dtype = model_dtype(model)
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
    fuse(model)
