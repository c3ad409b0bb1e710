"""Bytes on disk and in memory, and bits per quantized weight, read from headers and tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from hf_quant.checkpoint import TensorInfo, read_headers, read_json, weight_files
from hf_quant.errors import EvaluationError

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# Stored beside the codes, but the same for every value of the codes: shapes, tables of levels, the order of columns.
_CONSTANTS = ("weight_shape", "weight_g_idx", "g_idx", "quant_map", "quant_state", "weight_format", "scale_table")


def disk_bytes(directory: Path) -> int:
    """Bytes of the files that hold the weights (headers included, tokenizer and config not).

    Raises:
        CheckpointError: there are none, or only pickled ones.
    """
    return sum((directory / name).stat().st_size for name in weight_files(directory) if name.endswith(".safetensors"))


def memory_bytes(model: nn.Module) -> int:
    """Bytes of every parameter and buffer, also those that kernels keep beside them; shared storage counts once."""
    return sum(_storages(model).values())


def token_bytes(model: nn.Module) -> int | None:
    """Bytes of weights that one decoded token reads: all but an input embedding that is not the output head as well.

    None for mixtures of experts, which read only those that they choose.
    """
    if any("experts" in name.rpartition(".")[2] for name, _ in model.named_modules()):
        return None
    storages = _storages(model)
    find_input, find_output = (getattr(model, f"get_{end}put_embeddings", lambda: None) for end in ("in", "out"))
    table, head = find_input(), find_output()
    looked_up = (
        set() if table is None else _storages(table).keys() - (set() if head is None else _storages(head).keys())
    )
    return sum(nbytes for key, nbytes in storages.items() if key not in looked_up)


def bits_per_weight(candidate: Path, reference: Path) -> float:
    """Stored bits per weight over the weights that the candidate does not store as plain floats.

    Codes, scales (nested ones too) and zero points count; constant tables and shapes do not. A candidate without any
    quantized weight has the bits of its float matrices.

    Raises:
        EvaluationError: the candidate is quantized, and none of its tensors belongs to a weight of the reference, or
            a float one has another shape there: it was made from another model.
        CheckpointError: a directory is damaged.
    """
    stored, originals = read_headers(candidate), read_headers(reference)
    modules = _by_module(stored)
    bits = weights = 0
    float_bits = float_weights = 0
    misfit = ""
    for name, original in originals.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(original.shape) < 2:
            continue
        parts = modules.get(module, {})
        plain = parts.get("weight")
        if plain is not None and plain.dtype in _FLOATS:
            float_bits += 8 * plain.nbytes
            float_weights += _numel(plain)
            if plain.shape != original.shape and not misfit:
                misfit = (
                    f"{name} is {list(plain.shape)} in {candidate.name}, {list(original.shape)} in {reference.name}"
                )
            continue
        counted = [info for suffix, info in parts.items() if suffix != "bias" and not _is_constant(suffix)]
        if counted:
            bits += 8 * sum(info.nbytes for info in counted)
            weights += _numel(original)
    if weights and misfit:  # a smaller float model may have other shapes, a quantized copy may not
        raise EvaluationError(f"{misfit}.", "give the float model that it was made from.")
    if weights:
        return bits / weights
    if "quantization_config" in read_json(candidate, "config.json") or not float_weights:
        raise EvaluationError(
            f"no quantized tensor of {candidate.name} belongs to a weight of {reference.name}.",
            "give the float model that it was made from.",
        )
    return float_bits / float_weights


def _storages(model: nn.Module) -> dict[tuple[str, int], int]:
    """Bytes of every storage, by device and address."""
    seen: dict[tuple[str, int], int] = {}
    for tensor in _tensors(model):
        storage = tensor.untyped_storage()
        seen[(str(tensor.device), storage.data_ptr())] = storage.nbytes()
    return seen


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers, with what tensor subclasses and kernels hold beside their data."""
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            yield tensor
            yield from _state(getattr(tensor, "quant_state", None))
        extras = getattr(getattr(getattr(module, "_ready", None), "prepared", None), "extras", None)
        if isinstance(extras, Mapping):
            yield from (value for value in extras.values() if isinstance(value, torch.Tensor))
        state = getattr(module, "state", None)  # LLM.int8 moves its codes and scales here with the first forward pass
        for attribute in ("CB", "SCB"):
            value = getattr(state, attribute, None)
            if isinstance(value, torch.Tensor):
                yield value
        scales = getattr(module._parameters.get("weight"), "SCB", None)
        if isinstance(scales, torch.Tensor):
            yield scales


def _state(state: object) -> Iterator[torch.Tensor]:
    """The tensors of a bitsandbytes quant_state, nested ones too."""
    if state is None:
        return
    for attribute in ("absmax", "code", "offset"):
        value = getattr(state, attribute, None)
        if isinstance(value, torch.Tensor):
            yield value
    yield from _state(getattr(state, "state2", None))


def _by_module(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """module -> suffix -> tensor, where ``weight.absmax`` is a suffix of its module as ``weight`` is."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        module, _, suffix = name.rpartition(".")
        while module.endswith(".weight") or ".weight." in module:
            module, _, head = module.rpartition(".")
            suffix = f"{head}.{suffix}"
        found.setdefault(module, {})[suffix] = info
    return found


def _is_constant(suffix: str) -> bool:
    return any(part in suffix for part in _CONSTANTS)


def _numel(info: TensorInfo) -> int:
    total = 1
    for size in info.shape:
        total *= size
    return total
