"""A model directory without its weights: its class, its skeleton on the meta device, and the plan made from them."""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from hf_quant.checkpoint.headers import check_directory, read_headers, read_json, weight_files
from hf_quant.config import HfQuantConfig
from hf_quant.errors import CheckpointError, PlanError
from hf_quant.integrations.stock import StockRuntime, StoredConfig
from hf_quant.integrations.stored import missing_weights
from hf_quant.plan import Plan, make_plan

HEADER_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def plan_directory(path: str | Path, config: HfQuantConfig, trust_remote_code: bool = False) -> Plan:
    """Plan a checkpoint directory from its config.json and safetensors headers; no tensor is read.

    Raises:
        CheckpointError: the directory is incomplete, damaged, quantized already, or holds weights of a dtype that
            cannot be quantized.
        PlanError: as :func:`make_plan`; or an architecture that the installed transformers does not have.
    """
    headers = read_headers(path)
    settings = read_settings(path, trust_remote_code=trust_remote_code)
    if getattr(settings, "quantization_config", None):
        raise CheckpointError(f"{path} is quantized already.", "plan the float model it was made from.")
    stored: Counter[str] = Counter()
    for info in headers.values():
        if len(info.shape) >= 2:
            stored[info.dtype] += info.nbytes
    odd = [name for name in stored if name not in HEADER_DTYPES]
    if odd or not stored:
        raise CheckpointError(
            f"{path} holds weights of dtype {odd[0] if odd else 'none at all'}.",
            f"quantize a float checkpoint ({', '.join(HEADER_DTYPES)}).",
        )
    dtype = HEADER_DTYPES[stored.most_common(1)[0][0]]
    with torch.device("meta"):
        skeleton = model_class(settings)._from_config(settings, dtype=dtype)
    plan = make_plan(skeleton, config)
    missing = missing_weights(skeleton, headers, (layer.name for layer in plan.quantized))
    if missing:
        raise CheckpointError(
            f"{path} lacks {missing[0]}.weight ({len(missing)} such layers).", "download or copy the checkpoint again."
        )
    return plan


def plan_of_directory(path: str | Path, trust_remote_code: bool = False) -> Plan:
    """The plan that a quantized checkpoint was made by, as its config.json and safetensors headers tell it.

    Raises:
        CheckpointError: the directory is incomplete, damaged or not quantized.
        FormatError: files and config disagree, or a format that hf-quant does not hold.
        PlanError: an architecture that the installed transformers does not have.
    """
    check_directory(path)
    settings = read_settings(path, trust_remote_code=trust_remote_code)
    quantization = read_json(path, "config.json").get("quantization_config")
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{path} is not quantized.", "quantize it first: hf-quant quantize MODEL -o OUT.")
    with torch.device("meta"):
        # the dtype of config.json; without one, the class's own
        skeleton = model_class(settings)._from_config(settings)
    method = str(quantization.get("quant_method"))
    runtime = StockRuntime(StoredConfig(method, quantization), method, AutoHfQuantizer.from_config)
    files = [str(Path(path) / name) for name in weight_files(path) if name.endswith(".safetensors")]
    return runtime.read_plan(skeleton, files)


def read_settings(source: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config.

    Raises:
        CheckpointError: a directory without a config.json that transformers understands. What goes wrong with a Hub id
            is left as huggingface_hub says it.
    """
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not Path(source).is_dir():
            raise
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{Path(source) / 'config.json'} cannot be used: {first}",
            "repair it, or upgrade transformers if the model is newer.",
        ) from error


def model_class(settings: Any) -> Any:
    """The transformers class that a config names in ``architectures``, or the fitting Auto class for remote code.

    Raises:
        PlanError: no architecture, or one that this transformers does not have.
    """
    names = getattr(settings, "architectures", None) or []
    for name in names:
        found = getattr(transformers, name, None)
        if inspect.isclass(found):
            return found
    auto_map = getattr(settings, "auto_map", None) or {}
    for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"):
        if auto in auto_map:
            return getattr(transformers, auto)
    raise PlanError(
        f"transformers {transformers.__version__} has no architecture {names or 'named in config.json'}.",
        "upgrade transformers, or load the model yourself and call hf_quant.quantize(model, ...).",
    )
