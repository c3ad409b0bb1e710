"""ONNX files: codes are the checkpoint's, and onnxruntime computes and generates what the model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from typer.testing import CliRunner

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.checkpoint import verify_manifest
from hf_quant.checkpoint.contents import foreign_files
from hf_quant.cli import app
from hf_quant.convert import convert
from hf_quant.errors import ConfigError, FormatError
from hf_quant.export.onnx_layers import NBits
from hf_quant.grids import Scheme
from hf_quant.tensor import QuantizedTensor, unpack_codes

onnx = pytest.importorskip("onnx", reason="needs onnx")
runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnxscript")

TEXT = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "pad_token_id": 0}
TEXT |= {"num_attention_heads": 4, "max_position_embeddings": 128}
DECODER = TEXT | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
IMAGE |= {"image_size": 32, "patch_size": 8}
TIED = {"tie_word_embeddings": True}
# name -> model type, settings of the model, settings of the quantization
DECODERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "num_hidden_layers": 2}, {}),
    "asym-tied": ("llama", TIED, {"symmetric": False, "group_size": 16, "overrides": {"embed_tokens": {"bits": 4}}}),
    "int8-tied": ("qwen2", TIED, {"bits": 8, "group_size": -1, "overrides": {"embed_tokens": {"bits": 8}}}),
    "int8-asym": ("qwen3", {"head_dim": 16}, {"bits": 8, "symmetric": False, "group_size": 32}),
    "window": ("gemma3_text", {"head_dim": 16, "sliding_window": 6}, {}),
}


def _quantized(path: Path, model: PreTrainedModel, **options: Any) -> Path:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    hf_quant.quantize(model, HfQuantConfig(method="absmax", **options), path)
    return path


def _session(directory: Path) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float inputs
    return runtime.InferenceSession(directory / "model.onnx", options)


def _step(session: Any, ids: np.ndarray, mask: np.ndarray, past: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs for new tokens behind a cache."""
    feed: dict[str, np.ndarray] = {}
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    for node in session.get_inputs():
        if node.name.startswith("past"):
            empty = np.zeros((len(ids), node.shape[1], 0, node.shape[3]), dtype=np.float32)
            feed[node.name] = past.get(node.name.replace("past_key_values", "present"), empty)
        else:
            feed[node.name] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}[node.name]
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def _decoder(path: Path, kind: str, settings: dict[str, Any], options: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **DECODER | settings), dtype=torch.float32)
    return _quantized(path, model, **options)


@pytest.mark.parametrize("case", DECODERS)
def test_logits_with_and_without_a_cache_and_with_padding(case, tmp_path) -> None:
    quantized = _decoder(tmp_path / "quantized", *DECODERS[case])
    done = convert(quantized, tmp_path / "onnx", "onnx")
    assert done.exact and "text-generation-with-past" in done.notes[0]
    model = hf_quant.load(quantized, kernel="reference")
    session = _session(tmp_path / "onnx")
    ids, mask = torch.arange(3, 36).view(3, 11), torch.ones(3, 11, dtype=torch.int64)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits.numpy()
    whole = _step(session, ids.numpy(), mask.numpy(), {})
    first = _step(session, ids[:, :7].numpy(), mask[:, :7].numpy(), {})
    second = _step(session, ids[:, 7:10].numpy(), mask[:, :10].numpy(), first)
    last = _step(session, ids[:, 10:].numpy(), mask.numpy(), second)
    seen = mask.bool().numpy()  # what padding attends to is nobody's business
    np.testing.assert_allclose(whole["logits"][seen], expected[seen], atol=1e-5)
    pieces = np.concatenate([first["logits"], second["logits"], last["logits"]], axis=1)
    np.testing.assert_allclose(pieces[seen], expected[seen], atol=1e-5)
    assert [node.name for node in session.get_outputs()][:3] == ["logits", "present.0.key", "present.0.value"]
    assert session.get_inputs()[0].shape == ["batch_size", "sequence_length"]


def _initializers(directory: Path) -> tuple[list[Any], dict[str, np.ndarray]]:
    found = onnx.load(directory / "model.onnx")
    return list(found.graph.node), {t.name: onnx.numpy_helper.to_array(t) for t in found.graph.initializer}


def test_codes_and_scales_are_those_of_the_checkpoint(tmp_path) -> None:
    options = {"symmetric": False, "group_size": 32, "overrides": {"down_proj": {"bits": 8, "symmetric": True}}}
    quantized = _decoder(tmp_path / "quantized", "llama", {"num_hidden_layers": 1}, options)
    convert(quantized, tmp_path / "onnx", "onnx")
    model = hf_quant.load(quantized, kernel="reference")
    nodes, values = _initializers(tmp_path / "onnx")
    packed = [values[node.input[1]] for node in nodes if node.op_type == "MatMulNBits"]
    zeros = [values[node.input[3]] for node in nodes if node.op_type == "MatMulNBits"]
    (eight,) = (values[node.input[0]] for node in nodes if node.op_type == "DequantizeLinear")
    layer = model.model.layers[0]
    wanted = layer.self_attn.v_proj.quantized()
    codes = np.stack([wanted.codes()[:, 0::2] | (wanted.codes()[:, 1::2] << 4)]).reshape(32, 2, 16)
    assert any(found.shape == codes.shape and np.array_equal(found, codes) for found in packed)
    pairs = (wanted.zero_point[:, 0] | (wanted.zero_point[:, 1] << 4)).numpy()[:, None]
    assert len(packed) == 6 and any(np.array_equal(found, pairs) for found in zeros)
    assert eight.dtype == np.int8
    signed = layer.mlp.down_proj.quantized().codes().to(torch.int16).t() - 128
    assert np.array_equal(eight.astype(np.int16), signed.numpy())


def test_the_command_writes_a_whole_directory_without_our_format(tmp_path) -> None:
    quantized = _decoder(tmp_path / "quantized", "opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}, {})
    command = ["convert", str(quantized), str(tmp_path / "onnx"), "--to", "onnx", "--activations", "int8", "--json"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["layers"] == 6  # and nothing else on the standard output
    nodes, _ = _initializers(tmp_path / "onnx")
    layers = [{a.name: a.i for a in node.attribute} for node in nodes if node.op_type == "MatMulNBits"]
    assert len(layers) == 6 and all(layer["accuracy_level"] == 4 for layer in layers)
    assert verify_manifest(tmp_path / "onnx").ok and foreign_files(tmp_path / "onnx") == []
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert "quantization_config" not in config and config["model_type"] == "opt"
    assert (tmp_path / "onnx" / "generation_config.json").is_file()


def test_activations_are_a_choice_of_onnx_only(tmp_path) -> None:
    with pytest.raises(ConfigError, match="awq says nothing of activations"):
        convert(tmp_path, tmp_path / "other", "awq", activations="int8")


@pytest.mark.parametrize(("group", "columns", "block"), [(96, 192, 32), (-1, 576, 64), (512, 512, 256), (16, 48, 16)])
def test_a_group_is_whole_blocks_of_one_scale(group, columns, block) -> None:
    scheme = Scheme(symmetric=False, group_size=group)
    groups = scheme.groups(columns)
    scale, zero = torch.rand(3, groups) + 0.5, torch.randint(0, 16, (3, groups), dtype=torch.uint8)
    codes = torch.randint(0, 16, (3, columns), dtype=torch.uint8)
    layer = NBits(QuantizedTensor.from_codes(codes, scale, zero, scheme), None, int8_inputs=False)
    assert layer.block == block and "accuracy_level" not in layer.attributes
    assert layer.codes.shape == (3, columns // block, block // 2)
    assert torch.equal(unpack_codes(layer.codes.reshape(3, -1), 4, columns), codes)
    repeats = columns // groups // block
    assert torch.equal(layer.scale, scale.repeat_interleave(repeats, dim=1))
    zeros = unpack_codes(layer.zero, 4, columns // block)
    assert torch.equal(zeros, zero.repeat_interleave(repeats, dim=1))


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_encoders(kind, tmp_path) -> None:
    torch.manual_seed(0)
    if kind == "vit":
        model = AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, **IMAGE))
        feed = {"pixel_values": torch.randn(3, 3, 32, 32)}
    else:
        model = AutoModel.from_config(AutoConfig.for_model(kind, **TEXT))
        mask = torch.ones(3, 9, dtype=torch.int64)
        mask[1, 6:] = 0
        feed = {"input_ids": torch.arange(3, 30).view(3, 9), "attention_mask": mask}
        feed |= {"token_type_ids": torch.zeros(3, 9, dtype=torch.int64)}
    quantized = _quantized(tmp_path / "quantized", model.float())
    task = "image-classification" if kind == "vit" else "feature-extraction"
    assert task in convert(quantized, tmp_path / "onnx", "onnx").notes[0]
    reference = hf_quant.load(quantized, kernel="reference")
    session = _session(tmp_path / "onnx")
    found = session.run(None, {name: value.numpy() for name, value in feed.items()})
    with torch.no_grad():
        expected = reference(**feed)
    for node, value in zip(session.get_outputs(), found, strict=True):
        seen = slice(None) if value.ndim == 2 else feed["attention_mask"].bool().numpy()
        np.testing.assert_allclose(value[seen], expected[node.name].numpy()[seen], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "options", "match"),
    [
        ("llama", {}, {"grid": "nf4"}, r"q_proj cannot be converted: MatMulNBits holds evenly spaced values, not nf4"),
        ("llama", {}, {"group_size": 8}, "groups of 8 columns are not whole blocks of 16"),
        ("mixtral", {"num_local_experts": 4}, {}, "experts cannot be converted: which of its experts compute"),
        ("mamba", {"state_size": 8}, {"skip": ["re:.*dt_proj"]}, "its cache is not one of keys and values"),
        ("t5", {}, {}, "it has an encoder and a decoder"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(kind, settings, options, match, tmp_path) -> None:
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"vocab_size": 384, "d_model": 64, "d_ff": 128, "num_layers": 1, "num_heads": 4, "d_kv": 16}
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **sizes))
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **DECODER | settings))
    quantized = _quantized(tmp_path / "quantized", model.float(), **options)
    with pytest.raises(FormatError, match=match):
        convert(quantized, tmp_path / "onnx", "onnx")
    assert not (tmp_path / "onnx").exists()
