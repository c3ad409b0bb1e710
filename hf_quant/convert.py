"""A quantized checkpoint in another format, without quantizing it again: every weight stays what it is, or nothing is
written. (GGUF has float16 scales only: rounding others is possible, where it is asked for, and is measured.)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_quant import api
from hf_quant.checkpoint import (
    MANIFEST_FILE,
    RESULTS_FILE,
    atomic_directory,
    check_directory,
    check_output,
    checkpoint_digest,
    copy_side_files,
    read_json,
    read_manifest,
    record_evidence,
    verify_manifest,
    write_manifest,
)
from hf_quant.errors import CheckpointError, ConfigError, DependencyError, FormatError
from hf_quant.formats import FORMATS, awq, bitsandbytes, compressed_tensors, format_of, gguf, gptq
from hf_quant.integrations.published import PublishedConfig, model_dtype
from hf_quant.kernels import registry
from hf_quant.nn.swap import quantized_modules
from hf_quant.plan_bytes import restated
from hf_quant.provenance import EXPORT, KEY, STOCK, export_record, plan_rows
from hf_quant.tensor import QuantizedTensor
from hf_quant.version import __version__

_ANOTHER = "choose another --to, or quantize the float model again for this one."


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        source: the format that was read.
        target: the format that was written (``gptq_v2`` where ``gptq`` cannot hold a zero point of 0).
        layers: how many layers it holds.
        notes: what a user of the result should know.
        exact: whether every weight has the value that it had (false only where rounding was asked for).
    """

    source: str
    target: str
    layers: int
    notes: tuple[str, ...]
    exact: bool = True


def convert(
    directory: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    to: str,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    round_scales: bool = False,
    activations: str = registry.FLOAT,
) -> Conversion:
    """Re-pack a checkpoint; codes, scales and zero points keep their values.

    Args:
        directory: a quantized checkpoint that hf-quant reads.
        output_dir: a new directory, or one of ours with ``overwrite``; written whole or not at all.
        to: one of :data:`NAMES`.
        overwrite: replace an existing checkpoint.
        trust_remote_code: run model code that comes with the checkpoint.
        round_scales: for GGUF, allow scales and offsets to be rounded to float16; the notes say what it changed.
        activations: for ONNX, ``int8`` lets onnxruntime round the inputs of 4-bit layers to 8 bits, which is faster.

    Raises:
        ConfigError: an unknown target, or ``round_scales`` or ``activations`` for one that has no such choice.
        DependencyError: the target needs a package that is not installed.
        CheckpointError: not a quantized checkpoint, damaged, or one that our runtime does not hold.
        FormatError: the target cannot hold a layer exactly; the layer and the reason are named.
        OutputExistsError, OutputError: the output cannot be written.
    """
    if to not in NAMES:
        raise ConfigError(f"{to!r} is not a format to convert to.", f"use one of {', '.join(NAMES)}.")
    if round_scales and to != gguf.NAME:
        raise ConfigError(f"{to} rounds no scales.", f"drop round_scales, or convert to {gguf.NAME}.")
    if registry.check_activations(activations) != registry.FLOAT and to != "onnx":
        raise ConfigError(f"{to} says nothing of activations.", "drop activations, or convert to onnx.")
    source, output = Path(directory), Path(output_dir)
    check_directory(source)
    check_output(output, overwrite)
    config = read_json(source, "config.json").get("quantization_config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{source} is not quantized.", "quantize it first: hf-quant quantize MODEL -o OUT.")
    stored = format_of(config)
    # the layout in which tensors are stored: another one would only be undone
    model = api.load(source, kernel="reference", trust_remote_code=trust_remote_code)
    if to in EXPORTS:
        options: dict[str, Any] = {"round_scales": True} if round_scales else {}
        if activations != registry.FLOAT:
            options["activations"] = activations
        return _export(model, source, output, stored, to, overwrite, trust_remote_code=trust_remote_code, **options)
    target, notes = TARGETS[to](model)
    before = getattr(model.config, KEY, None) or {"version": __version__}
    made = model.hf_quantizer
    record = {"format": target, "converted_from": stored, STOCK: made.format.stock_loading(made.plan)}
    setattr(model.config, KEY, {**before, **record})
    api.save(model, output, overwrite=overwrite, side_files=source)
    return Conversion(stored, target, sum(1 for _ in quantized_modules(model)), notes)


def _export(
    model: PreTrainedModel, source: Path, output: Path, stored: str, to: str, overwrite: bool, **options: Any
) -> Conversion:
    """The files of another runtime in a directory with the tokenizer's and the licence's files and a manifest."""
    try:
        writer = import_module(f"hf_quant.export.{to}_file")
    except ImportError as error:
        raise DependencyError(
            f"{to} needs a package that is missing: {error}.", f"pip install hf-quant[{to}]."
        ) from error
    before = getattr(model.config, KEY, None) or {"version": __version__}
    digest, notes = _source_digest(source)
    record = export_record(before, target=to, stored=stored, model=model, source_digest=digest)
    model.config.__dict__.pop(KEY, None)  # the manifest says it; what others read says nothing of us
    layers = sum(1 for _ in quantized_modules(model))  # a writer may use the model up
    with atomic_directory(output, overwrite=overwrite) as directory:
        written = writer.write(model, source, directory, output.absolute().name, **options)
        copy_side_files(source, directory)
        record[EXPORT] |= {"file": written.file.name, "exact": written.exact, "notes": list(written.notes)}
        plan = plan_rows(model.hf_quantizer.plan) if digest is None else read_manifest(source).plan
        write_manifest(directory, record, plan)
        if digest is not None and (source / RESULTS_FILE).is_file():
            shutil.copyfile(source / RESULTS_FILE, directory / RESULTS_FILE)
            record_evidence(directory, [RESULTS_FILE])
    return Conversion(stored, to, layers, (*written.notes, *notes), written.exact)


def _source_digest(source: Path) -> tuple[str | None, tuple[str, ...]]:
    """The digest of a checkpoint of ours, which its results name; none, and why, where its files are others by now."""
    if not (source / MANIFEST_FILE).is_file():
        return None, ()
    found = verify_manifest(source)
    if found.changed or found.missing:
        return None, (f"{source.name} is not what its manifest records ({found}): its results are not taken along",)
    return checkpoint_digest(source), ()


def _to_stock(name: str) -> Callable[[PreTrainedModel], tuple[str, tuple[str, ...]]]:
    """The step that makes ``save_pretrained`` write the format ``name``."""

    def recast(model: PreTrainedModel) -> tuple[str, tuple[str, ...]]:
        quantizer: Any = model.hf_quantizer
        layers = dict(quantized_modules(model))
        chosen = name
        if name == gptq.V1.NAME and any(_has_zero(layer.weight_zero_point) for layer in layers.values()):
            chosen = gptq.V2.NAME
        target, dtype = FORMATS[chosen], model_dtype(model)
        for layer_name, layer in layers.items():
            kind = "Conv1D" if layer.transposed_source else "Linear"
            layer.assign(_exactly(layer.quantized(), chosen, kind, dtype, layer_name))
        scales = next((str(layer.weight_scale.dtype) for layer in layers.values()), "float32").removeprefix("torch.")
        scale_dtype = quantizer.plan.scale_dtype if chosen == bitsandbytes.NAME else scales
        plan = restated(quantizer.plan, chosen, scale_dtype)
        config = target.quantization_config(plan, dtype=dtype)
        if any(layer.quantized().order is not None for layer in layers.values()):
            config["desc_act"] = True
        quantizer.plan, quantizer.format_name = plan, chosen
        quantizer.loaded = config  # what GPTQ's config says beyond its tensors
        model.config.quantization_config = PublishedConfig(config)
        return chosen, _notes(chosen, scales, dtype)

    return recast


def _exactly(tensor: QuantizedTensor, name: str, kind: str, dtype: torch.dtype, layer: str) -> QuantizedTensor:
    """The same weight as the format stores it; raises FormatError when it would be another."""
    target = FORMATS[name]
    reason = target.holds(tensor.scheme, kind, tensor.shape)
    if reason is not None:
        raise FormatError(f"{layer} cannot be converted: {reason}.", _ANOTHER)
    if name in (gptq.V1.NAME, gptq.V2.NAME, awq.NAME) and tensor.scale is not None:
        half = tensor.scale.to(torch.float16)
        changed = half.float() != tensor.scale.float()
        if bool(changed.any()):
            first = float(tensor.scale[changed].flatten()[0])
            raise FormatError(
                f"{layer} cannot be converted: its scale {first:g} is no float16 number, and {name} stores float16.",
                _ANOTHER,
            )
        tensor = replace(tensor, scale=half)
    encoded = target.encode(tensor, dtype=dtype, name=layer)
    found = target.decode(encoded, tensor.scheme, name=layer)
    if not all(torch.equal(a, b) for a, b in zip(found.tensors(), tensor.tensors(), strict=True)):
        raise FormatError(f"{layer} does not come back from {name} as it is.", _ANOTHER)
    return tensor


def _has_zero(zero_point: torch.Tensor | None) -> bool:
    return zero_point is not None and bool((zero_point == 0).any())


def _notes(name: str, scales: str, dtype: torch.dtype) -> tuple[str, ...]:
    notes = []
    if name == gptq.V2.NAME:
        notes.append("zero points of 0 are beyond GPTQ's version 1: written as gptq_v2")
    stored = str(dtype).removeprefix("torch.")
    if name in (compressed_tensors.NAME, gptq.V1.NAME, gptq.V2.NAME, awq.NAME) and scales != stored:
        notes.append(
            f"stock transformers casts the {scales} scales to the model's {stored}: load it there with {scales}"
        )
    return tuple(notes)


# stock formats of transformers -> the step after which save_pretrained writes it
TARGETS: dict[str, Callable[[PreTrainedModel], tuple[str, tuple[str, ...]]]] = {
    name: _to_stock(name) for name in (compressed_tensors.NAME, gptq.V1.NAME, awq.NAME, bitsandbytes.NAME)
}
# files of other runtimes, each written by hf_quant.export.<name>_file.write, some with the extra of that name
EXPORTS = ("executorch", gguf.NAME, "modelopt", "onnx", "openvino")
NAMES = (*TARGETS, *EXPORTS)
