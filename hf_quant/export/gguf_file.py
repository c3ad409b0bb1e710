"""A quantized model as one GGUF file for llama.cpp and what is built on it; the codes are those of the checkpoint."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from hf_quant.export import Written, gguf_model, gguf_tokenizer
from hf_quant.export.gguf_model import Entry
from hf_quant.formats import gguf as blocks
from hf_quant.nn.packed import PackedWeight
from hf_quant.version import __version__

SUFFIX = ".gguf"
_FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    blocks.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    blocks.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    blocks.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_EXACT = "none: every weight has the value that it had"


def write(
    model: PreTrainedModel,
    source: Path,
    directory: Path,
    stem: str,
    *,
    round_scales: bool = False,
    trust_remote_code: bool = False,
) -> Written:
    """Write ``directory / "<stem>-<type>.gguf"``, tensor by tensor; the type is that of most weights.

    Args:
        model: quantized by hf-quant, or float.
        source: directory of its tokenizer, configs and card.
        directory: where the file goes; exists.
        stem: of the file's name.
        round_scales: allow scales and offsets to be rounded to float16.
        trust_remote_code: run tokenizer code that comes with the checkpoint.

    Raises:
        FormatError: llama.cpp cannot hold the model or a layer exactly, or is not known to compute the same.
        CheckpointError: the tokenizer is missing or is not the model's.
    """
    architecture = gguf_model.architecture_of(model)
    entries = list(gguf_model.entries(model, architecture))
    cost = _cost(entries, round_scales)
    weights: Counter[str] = Counter()
    for entry in entries:
        weights[_type(entry)] += math.prod(_shape(entry))
    kind = weights.most_common(1)[0][0]
    file = directory / f"{stem}-{kind}{SUFFIX}"
    writer = gguf.GGUFWriter(file, architecture.name)
    total = sum(weights.values())
    metadata = gguf.Metadata.load(model_path=source, model_name=stem, total_params=total)
    metadata.quantized_by = metadata.quantized_by or f"hf-quant {__version__}"
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)
    gguf_model.add_settings(writer, model, architecture)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("hf_quant.rounding", cost or _EXACT)
    rows = model.get_input_embeddings().num_embeddings
    notes = gguf_tokenizer.add_tokenizer(writer, source, rows, trust_remote_code=trust_remote_code)
    for entry in entries:
        _announce(writer, entry)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(_data(entry, round_scales))
    finally:
        writer.close()
    said = (f"llama.cpp's file is {file.name}", *([cost] if cost else []), *gguf_model.notes_of(model), *notes)
    return Written(file, said, exact=not cost)


def _cost(entries: list[Entry], round_scales: bool) -> str:
    """What rounding changes, in words; empty when nothing. Raises FormatError before anything is written."""
    found = []
    for entry in entries:
        if isinstance(entry.source, PackedWeight):
            found.append(blocks.check(entry.source.quantized(), name=entry.module, round_scales=round_scales))
    steps = max((cost.steps for cost in found), default=0.0)
    whole = blocks.Rounding(sum(cost.blocks for cost in found), sum(cost.of for cost in found), steps)
    return "" if whole.exact else str(whole)


def _type(entry: Entry) -> str:
    """The type in which llama.cpp wants a tensor: float32 for vectors, the model's own dtype for float matrices."""
    if isinstance(entry.source, PackedWeight):
        return blocks.type_of(entry.source.scheme)
    return "F32" if entry.source.ndim == 1 else _FLOATS[entry.source.dtype]


def _shape(entry: Entry) -> tuple[int, ...]:
    if isinstance(entry.source, PackedWeight):
        return entry.source.out_features, entry.source.in_features
    return tuple(entry.source.shape)


def _announce(writer: gguf.GGUFWriter, entry: Entry) -> None:
    kind = gguf.GGMLQuantizationType[_type(entry)]
    shape = _shape(entry)
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    # shapes are of elements here: the dtype says so
    writer.add_tensor_info(
        entry.name, shape, np.dtype(np.float32), math.prod(shape) // per_block * size, raw_dtype=kind
    )


def _data(entry: Entry, round_scales: bool) -> np.ndarray:
    if isinstance(entry.source, PackedWeight):
        found = blocks.encode(entry.source.quantized(), name=entry.module, round_scales=round_scales).cpu()
    else:
        found = entry.source.cpu()
        found = found.float() if found.ndim == 1 else found
    if entry.rows is not None:
        found = found.index_select(0, entry.rows)
    # numpy has no bfloat16: its bits travel as int16
    return (found.contiguous().view(torch.int16) if found.dtype == torch.bfloat16 else found.contiguous()).numpy()
