"""A transformers model as llama.cpp sees it: architecture, settings, and the name and row order of every tensor.

Tensor names come from gguf-py's own map. What is written here are the places where llama.cpp computes otherwise than
transformers, read in its sources (src/models/*.cpp and llama-model.cpp): they are refused, or said in a note.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from transformers import PreTrainedModel

from hf_quant.errors import FormatError
from hf_quant.nn.embedding import SharedHead
from hf_quant.nn.packed import PackedWeight

_STAY = "keep the format that the checkpoint has, or choose another --to."


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp runs one model type.

    Attributes:
        name: its architecture, ``general.architecture``.
        pairs: it rotates neighbouring columns of a head where transformers rotates halves, so that the rows of q and k
            (and what is added to them) are stored in another order.
        biases: it reads biases of the output projection and the MLP.
        frequencies: it reads a tensor of factors for the rotary frequencies.
    """

    name: str
    pairs: bool = False
    biases: bool = False
    frequencies: bool = False


_LLAMA = Architecture("llama", pairs=True, biases=True, frequencies=True)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "smollm3": Architecture("smollm3", pairs=True),
}
_NO_ROPE_STEP = 4  # smollm3: every fourth layer has no rotary embedding, fixed in llama.cpp
FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: in the file.
        module: the name in the model of the module or parameter that it comes from.
        source: a packed weight, or a float tensor.
        rows: int64 ``[out]``, which row of the source is stored at each place; None when the order is the same.
    """

    name: str
    module: str
    source: PackedWeight | torch.Tensor
    rows: torch.Tensor | None


def architecture_of(model: PreTrainedModel) -> Architecture:
    """What llama.cpp runs this model as.

    Raises:
        FormatError: it does not, or would compute something else.
    """
    config = model.config
    found = ARCHITECTURES.get(config.model_type)
    if found is None or not type(model).__name__.endswith("ForCausalLM"):
        raise FormatError(
            f"{type(model).__name__} ({config.model_type}) cannot be written as GGUF: "
            f"hf-quant knows llama.cpp's layout of causal models of {', '.join(ARCHITECTURES)}.",
            _STAY,
        )
    rope = config.rope_parameters
    kinds = ("default", "linear", "llama3") if found.frequencies else ("default", "linear")
    wrong = None
    if config.hidden_act != "silu":
        wrong = f"hidden_act={config.hidden_act!r} (llama.cpp computes silu there)"
    elif rope.get("rope_type", "default") not in kinds:
        wrong = f"rope_type={rope['rope_type']!r} (only {', '.join(kinds)} are known to be the same there)"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        wrong = f"partial_rotary_factor={rope['partial_rotary_factor']}"
    elif config.model_type == "smollm3":
        expected = [int((layer + 1) % _NO_ROPE_STEP != 0) for layer in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != expected:
            wrong = f"no_rope_layers={config.no_rope_layers} (llama.cpp leaves out every fourth layer)"
    if wrong is not None:
        raise FormatError(f"{config.model_type} with {wrong} cannot be written as GGUF.", _STAY)
    return found


def notes_of(model: PreTrainedModel) -> list[str]:
    """What llama.cpp leaves out of this model, in words."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return []
    return [f"llama.cpp attends to everything where this model has a window of {window}: beyond that they differ"]


def add_settings(writer: gguf.GGUFWriter, model: PreTrainedModel, architecture: Architecture) -> None:
    """Write the hyperparameters."""
    config = model.config
    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(model.get_input_embeddings().num_embeddings)
    head = _head_size(config)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def entries(model: PreTrainedModel, architecture: Architecture) -> Iterator[Entry]:
    """Every tensor of the file; a head that is tied to the embedding is not stored twice.

    Raises:
        FormatError: a parameter that llama.cpp's architecture has no place for.
    """
    config = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        if isinstance(module, SharedHead):
            continue
        own: dict[str, PackedWeight | torch.Tensor] = {}
        if isinstance(module, PackedWeight):
            own["weight"] = module
            bias = getattr(module, "bias", None)
            if isinstance(bias, torch.Tensor):
                own["bias"] = bias
        else:
            own.update({key: p for key, p in module._parameters.items() if p is not None and id(p) not in seen})
            seen.update(id(p) for p in module._parameters.values())
        for key, source in own.items():
            full = f"{module_name}.{key}"
            name = names.get_name(full, try_suffixes=(".weight", ".bias"))
            if name is None or (key == "bias" and not _reads_bias(module_name, architecture)):
                raise FormatError(
                    f"{full} has no place in llama.cpp's {architecture.name}, so this model would not load there.",
                    _STAY,
                )
            rows = None
            leaf = module_name.rpartition(".")[2]
            if architecture.pairs and leaf in heads:
                rows = paired(heads[leaf], _head_size(config))
            yield Entry(name, module_name, source.detach() if isinstance(source, torch.Tensor) else source, rows)
    factors = _frequencies(model)
    if factors is not None:
        yield Entry(FREQUENCIES, "rotary_emb", factors, None)


def paired(heads: int, size: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp stores them: of each head, row i of the first half, then row i of the second half.

    Args:
        heads: how many heads the projection has.
        size: rows of one head.

    Returns:
        int64 ``[heads * size]``.
    """
    return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).reshape(-1)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _reads_bias(module: str, architecture: Architecture) -> bool:
    return architecture.biases or module.endswith(("q_proj", "k_proj", "v_proj"))


def _frequencies(model: PreTrainedModel) -> torch.Tensor | None:
    """What llama.cpp divides the rotary frequencies by, float32 ``[head / 2]``: Llama 3's scaling, else None."""
    rope = model.config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    used = model.get_submodule("model.rotary_emb").get_buffer("inv_freq").float()
    size = 2 * used.numel()
    plain = float(rope["rope_theta"]) ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / used.double()).float()
