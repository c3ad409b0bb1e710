"""The Python interface: quantize a model or a directory, save it, load it, look inside."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel

from hf_quant.calibration import CalibrationData
from hf_quant.card_metadata import INHERITED_KEYS, read_base_card
from hf_quant.checkpoint import (
    atomic_directory,
    check_directory,
    check_output,
    copy_side_files,
    read_manifest,
    write_manifest,
)
from hf_quant.checkpoint.contents import MANIFEST_FILE, SIDE_FILES
from hf_quant.checkpoint.journal import discard
from hf_quant.config import HfQuantConfig
from hf_quant.errors import CheckpointError, ConfigError
from hf_quant.formats import FORMATS
from hf_quant.integrations.calibrated import Session, loading, run_on_files, run_on_model
from hf_quant.integrations.calibrated import session as session_of
from hf_quant.integrations.transformers import HfQuantQuantizer, prepare, publish, requested_kernel
from hf_quant.nn.splitting import experts_apart
from hf_quant.nn.swap import put_quantized, quantized_modules, share_tables, shared_heads, untie
from hf_quant.plan import make_plan
from hf_quant.provenance import KEY, exported_as, plan_rows
from hf_quant.skeleton import model_class, read_settings

logger = logging.getLogger("hf_quant")


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer of a model in memory."""

    name: str
    shape: tuple[int, int]
    label: str
    kernel: str | None
    reason: str | None
    nbytes: int


def quantize(
    model: PreTrainedModel | str | os.PathLike[str],
    config: HfQuantConfig | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    calibration: CalibrationData | None = None,
    session: Session | None = None,
) -> PreTrainedModel:
    """Quantize a model, and save it when ``output_dir`` is given.

    A calibrated run (``method="gptq"``, presets ``balanced`` and ``best``) of files with an ``output_dir`` keeps a
    journal beside it: after a kill, the same call goes on where it stopped and ends with the same bytes.

    Args:
        model: a float model in memory (its linear layers are replaced in place), or a directory or Hub id, which is
            read tensor by tensor: at no moment is the whole float model held.
        config: what to do; the default is 4-bit, symmetric, groups of 32, data-free adaptive scales.
        output_dir: where the checkpoint goes, whole or not at all.
        tokenizer: saved beside a model in memory, which is calibrated with it; for a directory its tokenizer files
            are used and copied.
        device: where the quantized model lives and where the work is done (default: CPU, or where the model is).
        dtype: of everything that stays in float; ``auto`` is the checkpoint's own.
        revision: of a Hub id.
        overwrite: replace an existing checkpoint in ``output_dir``.
        trust_remote_code: run model code that comes with the checkpoint.
        calibration: data to calibrate on, instead of what ``config.calibration`` names.
        session: callbacks for progress.

    Returns:
        The quantized model, ready to run.

    Raises:
        HfQuantError: bad input, named with its fix, before any output is written.
    """
    config = config or HfQuantConfig()
    if output_dir is not None:
        check_output(Path(output_dir), overwrite)
    if calibration is not None and config.calibration is None:
        raise ConfigError(f"calibration data is given, but method={config.method} uses none.", "use preset='balanced'.")
    source: str | None = None
    current = replace(session or Session())
    current.data = calibration or current.data
    with session_of(current):
        if isinstance(model, nn.Module):
            quantized = _quantize_in_memory(model, config, device, tokenizer)
        else:
            source = os.fspath(model)
            if output_dir is not None and current.journal is None:
                current.journal = journal_beside(Path(output_dir))
            quantized = _quantize_on_load(
                source, config, output_dir is not None, device, dtype, revision, trust_remote_code
            )
    if current.note:
        setattr(quantized.config, KEY, {**getattr(quantized.config, KEY), **current.note})
    if output_dir is not None:
        files = None if source is None else _side_files(source, revision)
        origin = str(files or getattr(quantized.config, "_name_or_path", None) or "")
        if origin:
            _record_base(quantized, Path(origin))
        save(quantized, output_dir, tokenizer, overwrite=overwrite, side_files=files)
        if current.journal is not None and config.calibration is not None:
            discard(current.journal)
    return quantized


def journal_beside(output_dir: Path) -> Path:
    """Where a calibrated run into ``output_dir`` keeps its journal until it is done."""
    return output_dir.parent / f".{output_dir.name}.journal"


def save(
    model: PreTrainedModel,
    output_dir: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    side_files: str | os.PathLike[str] | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a quantized model in its stock format with manifest and provenance, whole or not at all.

    Args:
        model: quantized by hf-quant (``quantize``, ``from_pretrained`` or ``load``).
        output_dir: a new directory, or one of ours with ``overwrite``.
        tokenizer: or processor, saved beside it.
        overwrite: replace an existing checkpoint.
        side_files: directory whose tokenizer, processor, chat template and licence files are copied.
        max_shard_size: as in ``save_pretrained``.

    Raises:
        CheckpointError: the model was not quantized by hf-quant.
        FormatError: its format cannot hold a layer.
        OutputExistsError, OutputError: the directory cannot be written.
    """
    if not any(True for _ in quantized_modules(model)) or not hasattr(model, "hf_quantizer"):
        raise CheckpointError(
            f"{type(model).__name__} is not quantized by hf-quant.",
            "quantize it with hf_quant.quantize(model, config).",
        )
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            f"{type(model).__name__} carries adapters.",
            "save them with model.save_pretrained, or merge them into the base first (merge_and_unload).",
        )
    model.hf_quantizer.is_serializable()
    output = Path(output_dir)
    check_output(output, overwrite)
    with atomic_directory(output, overwrite=overwrite) as directory:
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        if side_files is not None and Path(side_files).is_dir():
            copy_side_files(Path(side_files), directory)
        write_manifest(directory, getattr(model.config, KEY, {}), _plan_rows(model))
    return output


def load(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    kernel: str = "auto",
    activations: str = "float",
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a quantized checkpoint (a directory or a Hub id) on our runtime, still packed in memory.

    Args:
        directory: of a compressed-tensors, bitsandbytes 4-bit, GPTQ or AWQ checkpoint, ours or one that we can hold.
        device: default CPU.
        dtype: of the float part and the activations.
        kernel: ``auto`` or one of ``native``, ``cpu``, ``bitsandbytes``, ``reference``.
        activations: ``int8`` allows kernels to round the activations to 8 bits on the fly (see :class:`HfQuantConfig`).
        trust_remote_code: run model code that comes with the checkpoint.
        **kwargs: for ``from_pretrained``.

    Raises:
        CheckpointError: damaged, incomplete, or not a checkpoint that our runtime holds.
        KernelError: the kernel cannot run a layer.
    """
    source = os.fspath(directory)
    if Path(source).is_dir():
        if exported := exported_as(Path(source)):
            raise CheckpointError(
                f"{source} holds {exported} files, which are for another runtime.",
                "its card says how they are run; load the checkpoint that they were converted from.",
            )
        check_directory(source)
    elif Path(source).is_absolute() or source.startswith("."):
        raise CheckpointError(f"{source} is not a directory.", "pass the directory of a checkpoint, or a Hub id.")
    with requested_kernel(kernel, activations):
        model = _from_pretrained(source, device, dtype, trust_remote_code, **kwargs)
    if not any(True for _ in quantized_modules(model)):
        raise CheckpointError(
            f"{source} holds no layer that our runtime runs packed.",
            "load it with transformers' from_pretrained; `hf-quant inspect` says what it is.",
        )
    return model


def inspect_model(model: nn.Module) -> list[LayerReport]:
    """Every quantized layer with its scheme, its kernel and why that kernel, and its bytes in memory.

    A head that computes with the table of an embedding comes last, and has no bytes of its own.
    """
    reports = []
    for name, layer in quantized_modules(model):
        nbytes = sum(p.numel() * p.element_size() for leaf, p in layer.named_parameters() if leaf != "bias")
        shape = (layer.out_features, layer.in_features)
        reports.append(LayerReport(name, shape, layer.scheme.label, layer.kernel_name, layer.kernel_reason, nbytes))
    for name, head in shared_heads(model):
        table = head.table
        shape = (table.out_features, table.in_features)
        reports.append(LayerReport(name, shape, table.scheme.label, table.kernel_name, table.kernel_reason, 0))
    return reports


def _side_files(source: str, revision: str | None) -> Path:
    """The directory with the tokenizer, card and licence of a float model; of a Hub id, a snapshot without weights."""
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(source, revision=revision, allow_patterns=[*SIDE_FILES, "config.json", "README.md"]))


def _record_base(model: PreTrainedModel, files: Path) -> None:
    """Note in the provenance what the card inherits: the base model may be out of reach when the card is made."""
    if not (files / "config.json").is_file():
        return  # a model in memory that came from nowhere, or from the Hub in a way that only its maker knows
    provenance = dict(getattr(model.config, KEY))
    snapshot = files.parent.name == "snapshots"
    if snapshot:
        provenance["base_revision"] = files.name
    card = read_base_card(str(files)).metadata
    provenance["base_card"] = {key: card[key] for key in INHERITED_KEYS if isinstance(card.get(key), (str, list))}
    provenance["base_model_is_local"] = not snapshot
    setattr(model.config, KEY, provenance)


def _quantize_in_memory(
    model: nn.Module, config: HfQuantConfig, device: str | torch.device | None, tokenizer: Any
) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"{type(model).__name__} is not a transformers model.", "pass a PreTrainedModel or a path.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError(f"{type(model).__name__} is quantized already.", "start from the float model.")
    plan = make_plan(model, config)
    # every weight is quantized before any is replaced: a bad one leaves the model as it was
    quantizer = HfQuantQuantizer(config, pre_quantized=False)
    quantizer.plan, quantizer.format_name = plan, plan.format
    with experts_apart(model, [layer.name for layer in plan.quantized]):
        if config.calibration is not None:
            quantizer.calibrated = run_on_model(model, plan, config, tokenizer)
        tensors = {q.name: quantizer.quantize(q.name, _float_weight(model, q.name, device)) for q in plan.quantized}
        quantizer.take_calibrated(model)
    for name in list(tensors):
        put_quantized(model, name, tensors.pop(name), config.kernel, config.activations)
    quantizer.settle(model)
    share_tables(model, plan.shares)
    for layer in plan.quantized:
        if layer.untied_from:
            untie(model, layer.name)
    model.hf_quantizer = quantizer
    if device is not None:
        model.to(device)
    publish(model, quantizer)
    prepare(model)
    return model


def _float_weight(model: PreTrainedModel, name: str, device: str | torch.device | None) -> torch.Tensor:
    return model.get_parameter(f"{name}.weight").detach().to(device)


def _quantize_on_load(
    source: str,
    config: HfQuantConfig,
    saving: bool,
    device: str | torch.device | None,
    dtype: str | torch.dtype,
    revision: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    if Path(source).is_dir():
        check_directory(source)
    elif Path(source).is_absolute() or source.startswith("."):
        raise CheckpointError(f"{source} is not a directory.", "pass the directory of a float model, or a Hub id.")
    settings = read_settings(source, revision, trust_remote_code)
    if getattr(settings, "quantization_config", None):
        method = dict(settings.quantization_config).get("quant_method")
        raise CheckpointError(
            f"{source} is quantized already ({method}).", "start from the float model, or dequantize it first."
        )
    stored = getattr(settings, "dtype", None)
    wanted = stored if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    kind = model_class(settings)
    with torch.device("meta"):
        skeleton = kind._from_config(settings, **({} if wanted is None else {"dtype": wanted}))
    plan = make_plan(skeleton, config)
    if saving:
        FORMATS[plan.format].quantization_config(plan)  # raises FormatError before the hours of work
    options = {"revision": revision, "quantization_config": config}
    if config.calibration is None:
        return _from_pretrained(source, device, dtype, trust_remote_code, **options)
    calibrated = run_on_files(source, kind, plan, config, revision=revision, trust_remote_code=trust_remote_code)
    with loading(calibrated):
        return _from_pretrained(source, device, dtype, trust_remote_code, **options)


def _from_pretrained(
    source: str, device: str | torch.device | None, dtype: str | torch.dtype, trust_remote_code: bool, **kwargs: Any
) -> PreTrainedModel:
    settings = read_settings(source, kwargs.get("revision"), trust_remote_code)
    if device is not None:
        kwargs["device_map"] = {"": str(device)}
    if trust_remote_code:
        kwargs["trust_remote_code"] = True
    model: PreTrainedModel
    model, info = model_class(settings).from_pretrained(source, dtype=dtype, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{source} lacks {missing[0]} ({len(missing)} such tensors).", "download or copy the checkpoint again."
        )
    return model


def _plan_rows(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The plan for the manifest; a re-loaded model's own manifest says more than can be read from its files."""
    rows = plan_rows(model.hf_quantizer.plan, getattr(model.hf_quantizer, "results", ()))
    source = Path(getattr(model.config, "_name_or_path", "") or "")
    if isinstance(model.hf_quantizer, HfQuantQuantizer) or not (source / MANIFEST_FILE).is_file():
        return rows
    recorded = list(read_manifest(source).plan)
    if {row["name"]: row["label"] for row in rows} != {row.get("name"): row.get("label") for row in recorded}:
        return rows
    # in another format a layer takes other bytes
    now = {row["name"]: row["planned_bytes"] for row in rows if row["label"]}
    return [{**row, "planned_bytes": now.get(row["name"], row["planned_bytes"])} for row in recorded]
