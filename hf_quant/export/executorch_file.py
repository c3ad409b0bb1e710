"""A quantized causal model as one ExecuTorch program (XNNPACK), for phones; the codes are the checkpoint's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import executorch.kernels.quantized  # noqa: F401  # the lookups of quantized tables, for the runtime in this process
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import StaticCache, StaticLayer

from hf_quant.cache_name import CACHE
from hf_quant.errors import FormatError
from hf_quant.export import Written, executorch_layers, float_config
from hf_quant.export.tracing import quiet

FILE = "model.pte"
CONTEXT = 1024  # tokens of a conversation: the cache is as long from the start, and every token attends to all of it
_STAY = "keep the format that the checkpoint has, or choose another --to."
# of the largest logit; the runtime rounds inputs of layers to 8 bits, and a tie may fall to the other side
_TOLERANCE = 0.02
_NOISY = ("executorch", "torch.export", "root")


def write(
    model: PreTrainedModel, source: Path, directory: Path, stem: str, *, trust_remote_code: bool = False
) -> Written:
    """Write ``model.pte`` and the configs.

    The program is run on a few tokens and from its cache, and has to answer as the traced model does.

    Args:
        model: quantized by hf-quant, and used up. What is not quantized is written as float32.
        source: directory of the checkpoint (not read).
        directory: where the files go; exists.
        stem: a name for the model (not used).
        trust_remote_code: nothing of the checkpoint's code is run here.

    Raises:
        FormatError: XNNPACK cannot hold a layer, or ExecuTorch not the model, or it computes something else.
    """
    check(model)
    executorch_layers.put_operators(model)
    nn.Module.float(model).eval().requires_grad_(False)  # transformers' own refuses models that were quantized
    length = min(CONTEXT, getattr(model.config, "max_position_embeddings", CONTEXT))
    ids = torch.arange(9).mul(104729).remainder(model.get_input_embeddings().num_embeddings)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        program = lower(model, length)
    with (directory / FILE).open("wb") as file:
        program.write_to_file(file)
    difference = float((run(directory / FILE, ids, 5) - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        raise FormatError(
            f"ExecuTorch computes something else for {model.config.model_type}: "
            f"logits differ by {difference:.2g} of the largest.",
            _STAY,
        )
    config = float_config(model)
    config.dtype = torch.float32
    config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    return Written(
        directory / FILE,
        (
            f"{FILE} takes one sequence of up to {length} tokens; what is not quantized is float32",
            "XNNPACK rounds the inputs of quantized layers to 8 bits, token by token",
        ),
    )


def check(model: PreTrainedModel) -> None:
    """Raises FormatError for a model that cannot be written, naming it."""
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) or model.config.is_encoder_decoder:
        raise FormatError(
            f"{type(model).__name__} ({model.config.model_type}) cannot be written for ExecuTorch: it has to be a "
            "causal language model.",
            _STAY,
        )


class Decoder(nn.Module):
    """What ExecuTorch's runner of language models calls: new tokens and where they are; the cache is a buffer.

    Args:
        model: causal, in float32.
        length: tokens that the cache holds.

    Raises:
        FormatError: its cache is not one of keys and values, or one of a window.
    """

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        super().__init__()
        self.model = model
        self.held = StaticCache(config=model.config, max_cache_len=length)
        try:
            model(torch.zeros(1, 1, dtype=torch.int64), use_cache=True, **{CACHE: self.held})
        except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
            raise FormatError(f"{model.config.model_type} has no cache of a fixed length: {error}", _STAY) from error
        other = [type(layer).__name__ for layer in self.held.layers if type(layer) is not StaticLayer]
        if other or not all(layer.is_initialized for layer in self.held.layers):
            raise FormatError(
                f"{model.config.model_type} cannot be written for ExecuTorch: its cache "
                f"({other[0] if other else 'not used'}) is not one of all keys and values.",
                _STAY,
            )
        for index, layer in enumerate(self.held.layers):
            self.register_buffer(f"keys_{index}", torch.zeros_like(layer.keys), persistent=False)
            self.register_buffer(f"values_{index}", torch.zeros_like(layer.values), persistent=False)

    def forward(self, input_ids: torch.Tensor, cache_position: torch.Tensor) -> torch.Tensor:
        """Logits ``[1, tokens, vocabulary]`` of tokens ``[1, tokens]`` at consecutive positions ``[tokens]``."""
        for index, layer in enumerate(self.held.layers):
            layer.keys, layer.values = getattr(self, f"keys_{index}"), getattr(self, f"values_{index}")
            layer.cumulative_length = cache_position[0].clone()
        return self.model(input_ids=input_ids, use_cache=True, **{CACHE: self.held}).logits


def lower(model: PreTrainedModel, length: int) -> Any:
    """ExecuTorch's program of a model whose layers are operators.

    Raises:
        FormatError: it cannot be traced or lowered, or XNNPACK leaves a quantized layer to other kernels.
    """
    decoder = Decoder(model, length)
    tokens = torch.export.Dim("tokens", min=1, max=length - 1)
    sample = {"input_ids": torch.tensor([[3, 4, 5]]), "cache_position": torch.arange(3)}
    shapes = {"input_ids": {1: tokens}, "cache_position": {0: tokens}}
    with quiet(*_NOISY):
        try:
            traced = torch.export.export(decoder, (), sample, dynamic_shapes=shapes, strict=False)
            edge = to_edge_transform_and_lower(
                traced,
                partitioner=[XnnpackPartitioner()],
                constant_methods=facts(model, length),
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            left = sorted({str(node.target) for node in edge.exported_program().graph.nodes if _lost(node)})
            if not left:
                return edge.to_executorch()
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, AssertionError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FormatError(f"{model.config.model_type} cannot be lowered to ExecuTorch: {said}", _STAY) from error
    raise FormatError(f"XNNPACK does not take the quantized layers of {model.config.model_type}: {left[0]}", _STAY)


def facts(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """What ExecuTorch's runner of language models asks a program."""
    config: Any = model.config
    found: dict[str, Any] = {
        "get_max_seq_len": length,
        "get_max_context_len": length,
        "get_vocab_size": config.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,
    }
    if isinstance(config.bos_token_id, int):
        found["get_bos_id"] = config.bos_token_id
    settings = model.generation_config
    ends = config.eos_token_id if settings is None else settings.eos_token_id
    if ends is not None:
        found["get_eos_ids"] = list(ends) if isinstance(ends, list) else [ends]
    return found


def run(file: Path, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Logits of a program for tokens ``[1, tokens]``, read in two calls, the second after ``first`` tokens."""
    forward = Runtime.get().load_program(file).load_method("forward")
    positions = torch.arange(ids.shape[1])
    parts = (slice(0, first), slice(first, ids.shape[1]))
    found = [forward.execute([ids[:, part].contiguous(), positions[part].contiguous()])[0].clone() for part in parts]
    return torch.cat(found, dim=1)


def _lost(node: Any) -> bool:
    return node.op == "call_function" and "quantize_per" in str(node.target)
