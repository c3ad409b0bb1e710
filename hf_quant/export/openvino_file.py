"""A quantized model as a directory for OpenVINO: graph, weights, configs, tokenizer; the codes are the checkpoint's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from openvino.exceptions import OVTypeError
from transformers import AutoTokenizer, PreTrainedModel

from hf_quant.errors import CheckpointError, FormatError
from hf_quant.export import Written, openvino_model
from hf_quant.version import __version__

FILE = "openvino_model.xml"
TOKENIZER, DETOKENIZER = "openvino_tokenizer.xml", "openvino_detokenizer.xml"
# what makes the CPU plugin compute in float32 what the graph says: no bfloat16, no rounded activations or cache
EXACTLY = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}  # of the largest logit; ours are rounded


def write(
    model: PreTrainedModel, source: Path, directory: Path, stem: str, *, trust_remote_code: bool = False
) -> Written:
    """Write ``openvino_model.xml`` and ``.bin``, the configs, and the tokenizer as OpenVINO models.

    The graph is run on a few tokens, with padding and from its cache, and has to answer as the model does.

    Args:
        model: quantized by hf-quant, on the CPU.
        source: directory of its tokenizer.
        directory: where the files go; exists.
        stem: not used: the names are those that OpenVINO's libraries look for.
        trust_remote_code: run tokenizer code that comes with the checkpoint.

    Raises:
        FormatError: OpenVINO cannot hold the model or a layer, or computes something else.
        CheckpointError: the tokenizer cannot be read.
    """
    openvino_model.check(model)
    exported = openvino_model.trace(model)
    exported.program.set_rt_info(__version__, ["hf_quant", "version"])
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the graph says it; loaders would look for weights in the checkpoint's format
    exported.config, exported.generation_config = config, model.generation_config
    exported.save_pretrained(directory)
    difference = compare(model, directory / FILE)
    if not difference <= _TOLERANCE[model.dtype]:
        raise FormatError(
            f"OpenVINO computes something else for {config.model_type}: "
            f"logits differ by {difference:.2g} of the largest.",
            "keep the format that the checkpoint has, or choose another --to.",
        )
    return Written(directory / FILE, (f"the graph is {FILE}", *_add_tokenizer(source, directory, trust_remote_code)))


def compare(model: PreTrainedModel, graph: Path) -> float:
    """The largest difference of logits, in float32, as a share of the largest logit.

    Two rows of different lengths (the shorter one padded on the left), read in two calls, the second from the cache.
    """
    rows, length, first, padded = 2, 9, 5, 2
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(rows * length).mul(104729).remainder(vocabulary).view(rows, length)
    mask = torch.ones_like(ids)
    mask[1, :padded] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if openvino_model.takes_positions(model):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits.float()
    request = ov.Core().compile_model(graph, "CPU", EXACTLY).create_infer_request()
    found = [feed(request, inputs, 0, first), feed(request, inputs, first, length)]
    difference = (torch.cat(found, dim=1) - expected)[mask.bool()]
    return float(difference.abs().max() / expected.abs().max())


def feed(request: ov.InferRequest, inputs: dict[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
    """Logits ``[rows, stop - start, vocabulary]`` of the tokens from ``start``; those before are in the cache."""
    given = {name: value[:, start:stop] for name, value in inputs.items() if name != "attention_mask"}
    given["attention_mask"] = inputs["attention_mask"][:, :stop]
    given["beam_idx"] = torch.arange(len(inputs["input_ids"]), dtype=torch.int32)
    names = {name for port in request.model_inputs for name in port.get_names()}
    answer = request.infer({name: value.contiguous().numpy() for name, value in given.items() if name in names})
    return torch.from_numpy(answer["logits"].copy())


def _add_tokenizer(source: Path, directory: Path, trust_remote_code: bool) -> list[str]:
    """Write the tokenizer as two OpenVINO models, which openvino-genai runs; notes where that cannot be."""
    try:
        import openvino_tokenizers
    except ImportError:
        return ["openvino-genai needs the tokenizer as a graph: install openvino-tokenizers and convert again"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer of {source} cannot be read: {error}", "add its files.") from error
    try:
        models = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
    except OVTypeError as error:
        return [f"openvino-tokenizers does not know this tokenizer ({error}): openvino-genai cannot run the model"]
    for graph, name in zip(models, (TOKENIZER, DETOKENIZER), strict=True):
        ov.save_model(graph, directory / name)
    return []
