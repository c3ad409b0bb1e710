"""ExecuTorch programs: codes are the checkpoint's, and the runtime computes and generates what the model does."""

from __future__ import annotations

import json
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
from hf_quant.errors import FormatError
from hf_quant.grids import Scheme
from hf_quant.nn.swap import quantized_modules
from hf_quant.tensor import QuantizedTensor, unpack_codes

pytest.importorskip("executorch", reason="needs executorch")
from hf_quant.export import executorch_file, executorch_layers

SIZES = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
# name -> model type, settings of the model, settings of the quantization
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True}, {"group_size": 32}),
    "tied": ("llama", {"tie_word_embeddings": True}, {"group_size": -1}),
    "int8": ("qwen3", {"head_dim": 16}, {"bits": 8, "group_size": -1}),
    "table": (
        "qwen2",
        {"tie_word_embeddings": True},
        {"group_size": 32, "overrides": {"embed_tokens": {"bits": 4}, "down_proj": {"bits": 8, "group_size": -1}}},
    ),
    "table8": (
        "llama",
        {"tie_word_embeddings": True},
        {"group_size": 64, "overrides": {"embed_tokens": {"bits": 8, "group_size": -1}}},
    ),
}


def _quantized(path: Path, kind: str, settings: dict[str, Any], options: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | settings), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    hf_quant.quantize(model, HfQuantConfig(method="absmax", **options), path)
    return path


def _rounded(quantized: Path) -> Any:
    """The checkpoint's model, its layers on inputs that are rounded to 8 bits, token by token."""
    model: Any = hf_quant.load(quantized, kernel="reference", dtype=torch.float32)

    def round_inputs(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = inputs[0]
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        step = (high - low).clamp(min=1e-10) / 255
        zero = (-128 - low / step).round().clamp(-128, 127)
        return (((x / step).round() + zero).clamp(-128, 127).sub(zero).mul(step),)

    for _, layer in quantized_modules(model):
        if not isinstance(layer, hf_quant.nn.embedding.QuantEmbedding):
            layer.register_forward_pre_hook(round_inputs)
    for _, head in hf_quant.nn.swap.shared_heads(model):
        head.register_forward_pre_hook(round_inputs)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_from_the_cache_are_those_of_rounded_inputs(case, tmp_path) -> None:
    quantized = _quantized(tmp_path / "quantized", *CASES[case])
    done = convert(quantized, tmp_path / "out", "executorch")
    assert done.exact and "up to 64 tokens" in done.notes[0]
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        expected = _rounded(quantized)(ids).logits
    unrounded = hf_quant.load(quantized, kernel="reference", dtype=torch.float32)
    found = executorch_file.run(tmp_path / "out" / "model.pte", ids, 7)
    # where a value lies between two roundings, the order of sums decides, and what comes after it goes another way:
    # so it does in table8, whose tokens are compared one by one below
    assert float((found - expected).abs().max() / expected.abs().max()) < (0.02 if case == "table8" else 0.005)
    if case != "table8":
        with torch.no_grad():
            far = float((unrounded(ids).logits - expected).abs().mean())
        assert float((found - expected).abs().mean()) < 0.1 * far
    forward = executorch_file.Runtime.get().load_program(tmp_path / "out" / "model.pte").load_method("forward")
    alone = [token[None, None] for token in ids[0]]
    first = torch.cat([forward.execute([token, torch.tensor([0])])[0].clone() for token in alone])
    with torch.no_grad():
        expected = torch.cat([_rounded(quantized)(token).logits for token in alone])
    bound = 1e-4 * float(expected.abs().max())
    off = (first - expected).abs().amax(dim=(1, 2))
    assert int((off < bound).sum()) >= 9, off  # of 12
    # rounding the inputs is what changes logits: without it hardly any are the same
    with torch.no_grad():
        plain = torch.cat([unrounded(token).logits for token in alone])
    assert int(((plain - expected).abs().amax(dim=(1, 2)) < bound).sum()) <= 3


def test_the_codes_are_in_the_file(tmp_path) -> None:
    """XNNPACK's 4-bit blocks are our packing; 8-bit weights are signed bytes; scales are bfloat16 or float32."""
    options = {"group_size": 32, "overrides": {"down_proj": {"bits": 8, "group_size": -1}}}
    quantized = _quantized(tmp_path / "quantized", "llama", {}, options)
    convert(quantized, tmp_path / "out", "executorch")
    held = (tmp_path / "out" / "model.pte").read_bytes()
    layers = dict(quantized_modules(hf_quant.load(quantized, kernel="reference")))
    assert len(layers) == 14
    for layer in layers.values():
        tensor = layer.quantized()
        eight = tensor.scheme.bits == 8
        codes = tensor.packed ^ 128 if eight else tensor.packed
        scale = tensor.scales().float() if eight else tensor.scales().to(torch.bfloat16)
        assert codes.contiguous().numpy().tobytes() in held
        assert scale.contiguous().view(torch.uint8).numpy().tobytes() in held


def test_generates_token_by_token(tmp_path) -> None:
    quantized = _quantized(tmp_path / "quantized", *CASES["llama"])
    convert(quantized, tmp_path / "out", "executorch")
    forward = executorch_file.Runtime.get().load_program(tmp_path / "out" / "model.pte").load_method("forward")
    ids = torch.tensor([[5, 80, 23, 301]])
    model, done = _rounded(quantized), 0
    for _ in range(8):
        positions = torch.arange(done, ids.shape[1])
        logits = forward.execute([ids[:, done:].contiguous(), positions])[0].clone()
        with torch.no_grad():
            expected = model(ids).logits[:, -1:]
        assert logits[0, -1].argmax() == expected[0, -1].argmax()
        done = ids.shape[1]
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)


def test_the_command_writes_a_whole_directory(tmp_path) -> None:
    quantized = _quantized(tmp_path / "quantized", *CASES["llama"])
    command = ["convert", str(quantized), str(tmp_path / "out"), "--to", "executorch", "--json"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["layers"] == 14
    assert verify_manifest(tmp_path / "out").ok
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    program = executorch_file.Runtime.get().load_program(tmp_path / "out" / "model.pte")
    said = {
        name: program.load_method(name).execute([]) for name in ("get_max_seq_len", "get_vocab_size", "get_eos_ids")
    }
    assert said == {"get_max_seq_len": [64], "get_vocab_size": [384], "get_eos_ids": [2]}


def test_a_program_that_answers_otherwise_is_not_written(tmp_path, monkeypatch) -> None:
    quantized = _quantized(tmp_path / "quantized", "llama", {"num_hidden_layers": 1}, {"group_size": 32})
    monkeypatch.setattr(executorch_file, "run", lambda file, ids, first: torch.zeros(1, 9, 384))
    with pytest.raises(FormatError, match="computes something else for llama"):
        convert(quantized, tmp_path / "out", "executorch")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "settings", "options", "match"),
    [
        ("llama", {}, {"grid": "nf4"}, r"q_proj cannot be converted: XNNPACK has evenly spaced values, not nf4"),
        ("llama", {}, {"symmetric": False}, "packed weights have no zero points"),
        ("llama", {}, {"group_size": 16}, "groups of a multiple of 32 columns, not 16"),
        ("llama", {}, {"bits": 8, "group_size": 32}, "8-bit weights have one scale per output, not groups of 32"),
        ("llama", {}, {"group_size": 32, "scale_dtype": "float32"}, "its scales are no bfloat16 numbers"),
        ("mixtral", {"num_local_experts": 4}, {"group_size": 32}, "experts cannot be converted: which of its experts"),
        ("gemma3_text", {"head_dim": 16, "sliding_window": 6}, {"group_size": 32}, "is not one of all keys and values"),
    ],
)
def test_what_cannot_be_held_is_refused(kind, settings, options, match, tmp_path) -> None:
    quantized = _quantized(tmp_path / "quantized", kind, settings, options)
    with pytest.raises(FormatError, match=match):
        convert(quantized, tmp_path / "out", "executorch")
    assert not (tmp_path / "out").exists()


def test_models_and_scales_that_are_none_are_refused() -> None:
    bert = AutoConfig.for_model("bert", **{**SIZES, "num_hidden_layers": 1})
    with pytest.raises(FormatError, match="it has to be a causal language model"):
        executorch_file.check(AutoModel.from_config(bert))
    codes = torch.randint(0, 16, (2, 64), dtype=torch.uint8)
    scale = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    zero = QuantizedTensor.from_codes(codes, scale, None, Scheme(group_size=32))
    negative = QuantizedTensor.from_codes(codes, scale - 1, None, Scheme(group_size=32))
    assert executorch_layers.holds(negative) == "one of its scales is not a normal positive number"
    layer = executorch_layers.Product(zero, None)  # XNNPACK has no scale of 0: other numbers for the same weights
    assert executorch_layers.holds(zero) is None and bool((layer.scale > 0).all())
    assert torch.equal(layer.codes * layer.scale.repeat_interleave(32, dim=1), zero.dequantize())


def test_a_table_of_4_bits_has_the_even_column_above() -> None:
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    tensor = QuantizedTensor.from_codes(codes, torch.rand(5, 2) + 0.5, None, Scheme(group_size=32))
    table = executorch_layers.Table(tensor, (2.0, False))
    assert torch.equal(unpack_codes(table.codes, 4, 64), codes.view(5, 32, 2).flip(-1).view(5, 64))
    ids = torch.tensor([[4, 0]])
    assert torch.allclose(table(ids), tensor.dequantize()[ids] * 2)
