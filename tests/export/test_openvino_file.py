"""OpenVINO directories: the constants are the codes of the checkpoint, and the graph answers as it does."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.checkpoint import verify_manifest
from hf_quant.cli import app
from hf_quant.convert import convert
from hf_quant.errors import FormatError, OutputExistsError
from hf_quant.grids import Scheme
from hf_quant.nn.swap import quantized_modules
from hf_quant.tensor import QuantizedTensor

ov = pytest.importorskip("openvino", reason='OpenVINO is not installed (pip install "hf-quant[openvino]")')
from hf_quant.export import openvino_file, openvino_model, openvino_weights  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # attention that looks somewhere, so that a wrong position shows
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"head_dim": 16, "sliding_window": 4}
# name -> model type, settings of the model, of the quantization, and the types that the plugin multiplies with
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], set[str]]] = {
    "llama": ("llama", {"attention_bias": True}, {"group_size": 32}, {"i4", "f32"}),
    "llama-tied": (
        "llama",
        {"tie_word_embeddings": True},
        {"symmetric": False, "overrides": {"embed_tokens": {"bits": 8}, "re:.*layers.1.*": {"bits": 8}}},
        {"u4", "u8"},
    ),
    "gemma3": ("gemma3_text", {**WINDOW, "query_pre_attn_scalar": 16}, {"bits": 8, "group_size": -1}, {"i8", "f32"}),
    "gpt2": ("gpt2", {}, {"grid": "nf4", "group_size": 32}, {"nf4", "f32"}),
}


@pytest.fixture(scope="module")
def made(tiny_tokenizer, tmp_path_factory):
    """``made(case)``: the quantized checkpoint and the directory for OpenVINO; read only."""
    found: dict[str, tuple[Path, Path]] = {}

    def make(case: str) -> tuple[Path, Path]:
        if case not in found:
            kind, settings, quantization, _ = CASES[case]
            root = tmp_path_factory.mktemp(case)
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, **{**SIZES, **settings})
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(root / "float")
            tiny_tokenizer.save_pretrained(root / "float")
            hf_quant.quantize(str(root / "float"), HfQuantConfig(method="absmax", **quantization), root / "quantized")
            convert(root / "quantized", root / "openvino", "openvino")
            found[case] = root / "quantized", root / "openvino"
        return found[case]

    return make


@pytest.mark.parametrize(
    ("scheme", "columns", "dtype"),
    [
        (Scheme(group_size=32), 64, torch.bfloat16),
        (Scheme(symmetric=False, group_size=32), 64, torch.float16),
        (Scheme(symmetric=False, group_size=11), 33, torch.bfloat16),
        (Scheme(group_size=-1), 33, torch.float32),
        (Scheme(bits=8, group_size=-1), 64, torch.bfloat16),
        (Scheme(bits=8, symmetric=False, group_size=16), 64, torch.float32),
        (Scheme(grid="nf4", group_size=32), 64, torch.float32),
    ],
    ids=lambda value: value.label if isinstance(value, Scheme) else str(value),
)
def test_the_nodes_stand_for_the_weight_bit_for_bit(scheme, columns, dtype, tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 1 << scheme.bits, shape, generator=generator, dtype=torch.uint8)

    groups = scheme.groups(columns)
    scale = torch.randn(5, groups, generator=generator).to(dtype)
    zero = None if scheme.symmetric else codes(5, groups)
    tensor = QuantizedTensor.from_codes(codes(5, columns), scale, zero, scheme)
    graph = ov.Model([openvino_weights.decompressed(tensor, "layer")], [])
    ov.save_model(graph, tmp_path / "weight.xml", compress_to_fp16=False)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    found = ov.Core().compile_model(tmp_path / "weight.xml", "CPU", options)([])[0]
    assert torch.equal(torch.from_numpy(found), tensor.dequantize())


@pytest.mark.parametrize("case", CASES)
def test_the_graph_answers_as_the_model_and_keeps_its_weights_packed(case, made) -> None:
    quantized, directory = made(case)
    model = hf_quant.load(quantized, kernel="reference")
    assert openvino_file.compare(model, directory / openvino_file.FILE) < 2e-5
    compiled = ov.Core().compile_model(directory / openvino_file.FILE, "CPU", openvino_file.EXACTLY)
    assert len(compiled.query_state()) == 4  # keys and values of two layers
    found: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        kind = node.get_rt_info()["layerType"].astype(str)
        kinds[kind] += 1
        if kind == "FullyConnected":
            found[node.input_value(1).get_element_type().to_string()] += 1
    assert set(found) == CASES[case][3]
    heads = 0 if model.get_output_embeddings() in dict(quantized_modules(model)).values() else 1
    linear = sum(1 for _, layer in quantized_modules(model) if layer is not model.get_input_embeddings())
    assert sum(found.values()) == linear + heads
    assert kinds["ScaledDotProductAttention"] == 2  # each with its cache inside


def test_generation_beyond_the_window_is_that_of_the_model(made) -> None:
    """Greedy, token by token, through the state: longer than gemma's window of 4."""
    quantized, directory = made("gemma3")
    model = hf_quant.load(quantized, kernel="reference")
    prompt, wanted = torch.tensor([[5, 80, 23, 301, 77, 9]]), 8
    model.generation_config.eos_token_id = None
    expected = model.generate(prompt, max_new_tokens=wanted, do_sample=False, pad_token_id=0)[0]
    compiled = ov.Core().compile_model(directory / openvino_file.FILE, "CPU", openvino_file.EXACTLY)
    request = compiled.create_infer_request()
    ids, done = prompt, 0
    for _ in range(wanted):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["position_ids"] = torch.arange(ids.shape[1])[None]
        logits = openvino_file.feed(request, inputs, done, ids.shape[1])
        done = ids.shape[1]
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    assert ids[0].tolist() == expected.tolist()


def test_the_directory_is_whole_and_its_own_command_overwrites_it(made, tmp_path) -> None:
    quantized, directory = made("llama")
    names = {file.name for file in directory.iterdir()}
    assert {"openvino_model.xml", "openvino_model.bin", "config.json", "tokenizer.json", "hf_quant.json"} <= names
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    assert verify_manifest(directory).ok
    with pytest.raises(OutputExistsError):
        convert(quantized, directory, "openvino")
    command = ["convert", str(quantized), str(directory), "--to", "openvino", "--overwrite"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    assert "14 layers from compressed-tensors to openvino, exactly" in run.output


def test_a_model_that_answers_otherwise_is_not_written(made, tmp_path, monkeypatch) -> None:
    """Nothing is left behind when the graph does not compute what the model does."""
    monkeypatch.setattr(openvino_file, "compare", lambda model, graph: 0.5)
    with pytest.raises(FormatError, match="computes something else"):
        convert(made("llama")[0], tmp_path / "out", "openvino")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_held_is_refused_by_name(tiny_checkpoint, tmp_path) -> None:
    fp4 = HfQuantConfig(method="absmax", grid="fp4", group_size=64)
    hf_quant.quantize(str(tiny_checkpoint("llama")), fp4, tmp_path / "fp4")
    with pytest.raises(FormatError, match=r"q_proj cannot be written for OpenVINO: its f4e2m1"):
        convert(tmp_path / "fp4", tmp_path / "out", "openvino")
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2}
    mixtral = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **{**SIZES, **settings}))
    mixtral.save_pretrained(tmp_path / "mixtral")
    hf_quant.quantize(str(tmp_path / "mixtral"), HfQuantConfig(method="absmax"), tmp_path / "experts")
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.experts cannot be written for OpenVINO"):
        convert(tmp_path / "experts", tmp_path / "out", "openvino")
    bert = AutoConfig.for_model("bert", **{**SIZES, "num_hidden_layers": 1})
    with pytest.raises(FormatError, match="it has to be a causal language model"):
        openvino_model.check(AutoModel.from_config(bert))
