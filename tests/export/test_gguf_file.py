"""GGUF files: what gguf-py and stock transformers read back from them is the quantized model, weight by weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, TokenType, dequantize
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.checkpoint import verify_manifest
from hf_quant.cli import app
from hf_quant.convert import convert
from hf_quant.errors import CheckpointError, ConfigError, FormatError
from hf_quant.export.gguf_model import paired
from hf_quant.nn.swap import put_float, quantized_modules

IDS = torch.arange(3, 27).view(2, 12)
COMMON = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> model type, settings of the model, settings of the quantization, type of the file
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}, {}, "Q4_0"),
    "llama-g64": ("llama", {"rope_parameters": LLAMA3}, {"group_size": 64}, "Q4_0"),
    "llama-asym": ("llama", {}, {"symmetric": False}, "Q4_1"),
    "mistral-int8": ("mistral", {"head_dim": 32}, {"bits": 8}, "Q8_0"),
    "qwen2-channel": ("qwen2", {}, {"group_size": -1}, "Q4_0"),
    "qwen3-head": ("qwen3", {"head_dim": 128}, {"overrides": {"lm_head": {"bits": 8}}}, "Q4_0"),
    "smollm3": ("smollm3", {"tie_word_embeddings": True}, {"skip": ["re:.*layers.1.*"]}, "Q4_0"),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, {"overrides": {"embed_tokens": {"bits": 8}}}, "Q4_0"),
}
STOCK_READS = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def made(tiny_tokenizer, tmp_path_factory):
    """``made(case)``: the quantized checkpoint and the directory with its GGUF file; read only."""
    found: dict[str, tuple[Path, Path]] = {}

    def make(case: str) -> tuple[Path, Path]:
        if case not in found:
            kind, settings, quantization, _ = CASES[case]
            root = tmp_path_factory.mktemp(case)
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, **{**COMMON, **settings})
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(root / "float")
            tiny_tokenizer.save_pretrained(root / "float")
            hf_quant.quantize(str(root / "float"), HfQuantConfig(method="absmax", **quantization), root / "quantized")
            convert(root / "quantized", root / "file", "gguf", round_scales=not quantization.get("symmetric", True))
            found[case] = root / "quantized", root / "file"
        return found[case]

    return make


def _file(directory: Path) -> Path:
    (file,) = directory.glob("*.gguf")
    return file


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = GGUFReader(_file(directory))
    tensors = {t.name: t for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def _values(tensor: Any) -> torch.Tensor:
    return torch.tensor(dequantize(tensor.data, tensor.tensor_type))


@pytest.mark.parametrize("case", [name for name in CASES if name != "llama-asym"])
def test_every_weight_is_the_same_bit_for_bit(case, made) -> None:
    quantized, directory = made(case)
    kind, _, _, label = CASES[case]
    fields, tensors = _read(directory)
    assert _file(directory).name == f"file-{label}.gguf"
    assert fields["hf_quant.rounding"].startswith("none")
    model = hf_quant.load(quantized, kernel="reference")
    config = model.config
    layers = dict(quantized_modules(model))
    assert layers
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    parts |= {"mlp.gate_proj": "ffn_gate"}
    whole = {"lm_head": "output", "model.embed_tokens": "token_embd"}
    for name, layer in layers.items():
        _, _, tail = name.partition("layers.")
        number, _, part = tail.partition(".")
        stored = tensors[f"{whole[name]}.weight" if name in whole else f"blk.{number}.{parts[part]}.weight"]
        assert stored.tensor_type.name == {4: "Q4_0", 8: "Q8_0"}[layer.scheme.bits]
        expected = layer.dequantize()
        if part.endswith(("q_proj", "k_proj")) and kind in ("llama", "mistral", "smollm3"):
            heads = config.num_attention_heads if part.endswith("q_proj") else config.num_key_value_heads
            expected = torch.cat([_interleaved(head) for head in expected.chunk(heads)])
        assert torch.equal(_values(stored), expected), name
    assert ("output.weight" in tensors) != bool(config.tie_word_embeddings)


def _interleaved(head: torch.Tensor) -> torch.Tensor:
    """Rows 0, n/2, 1, n/2 + 1, ... of one head, written with a loop."""
    half = len(head) // 2
    return torch.stack([head[row // 2 + (row % 2) * half] for row in range(len(head))])


def test_the_order_of_rows() -> None:
    assert paired(2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("case", [name for name, (kind, *_) in CASES.items() if kind in STOCK_READS])
def test_stock_transformers_computes_the_same_from_the_file(case, made) -> None:
    quantized, directory = made(case)
    model = hf_quant.load(quantized, kernel="reference")
    put_float(model, torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(directory, gguf_file=_file(directory).name, dtype=torch.float32)
    # transformers' reader knows neither biases of the llama architecture nor the factors of its frequencies
    own = {name: parameter for name, parameter in model.named_parameters() if name.endswith("bias")}
    stock.model.rotary_emb.inv_freq.copy_(model.model.rotary_emb.inv_freq)
    if "attention_bias" in CASES[case][1]:
        for name in own:
            module, _, key = name.rpartition(".")
            stock.get_submodule(module).register_parameter(key, own[name])
    with torch.no_grad():
        expected, found = model(IDS).logits, stock(IDS).logits
    exact = case != "llama-asym"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if exact else 1e-2)
    assert exact or not torch.equal(found, expected)


@pytest.mark.parametrize("case", ["llama", "llama-g64", "qwen2-channel"])
def test_vectors_and_factors(case, made) -> None:
    quantized, directory = made(case)
    _, tensors = _read(directory)
    model = hf_quant.load(quantized, kernel="reference")
    attention = model.model.layers[1].self_attn
    assert torch.equal(_values(tensors["blk.1.attn_norm.weight"]), model.model.layers[1].input_layernorm.weight.data)
    if case == "qwen2-channel":
        assert torch.equal(_values(tensors["blk.1.attn_q.bias"]), attention.q_proj.bias.data)
    if case == "llama":
        expected = torch.cat([_interleaved(head) for head in attention.q_proj.bias.data.chunk(4)])
        assert torch.equal(_values(tensors["blk.1.attn_q.bias"]), expected)
        assert "blk.1.ffn_down.bias" in tensors and "rope_freqs.weight" not in tensors
    if case == "llama-g64":
        plain = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
        used = plain / _values(tensors["rope_freqs.weight"])
        torch.testing.assert_close(used, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
        assert _values(tensors["rope_freqs.weight"]).max() == pytest.approx(8.0)


def test_the_settings_and_the_tokenizer(made) -> None:
    quantized, directory = made("mistral-int8")
    fields, _ = _read(directory)
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    assert fields["general.architecture"] == "llama" and fields["general.file_type"] == 7
    assert (fields["llama.block_count"], fields["llama.context_length"]) == (4, 128)
    assert (fields["llama.attention.key_length"], fields["llama.rope.dimension_count"]) == (32, 32)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 384
    assert all(tokens[id_] == text for text, id_ in tokenizer.get_vocab().items())
    assert kinds[:3] == [TokenType.CONTROL] * 3 and kinds[3] == TokenType.NORMAL
    assert kinds.count(TokenType.UNUSED) == 384 - len(tokenizer)
    assert fields["tokenizer.ggml.bos_token_id"] == 1 and fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["general.quantized_by"].startswith("hf-quant ")
    assert verify_manifest(directory).ok and (directory / "tokenizer.json").is_file()


def test_float_layers_keep_their_dtype(tiny_tokenizer, tmp_path) -> None:
    config = AutoConfig.for_model("llama", **COMMON)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "float")
    tiny_tokenizer.save_pretrained(tmp_path / "float")
    recipe = HfQuantConfig(method="absmax", skip=["re:.*q_proj"])
    model = hf_quant.quantize(str(tmp_path / "float"), recipe, tmp_path / "quantized")
    convert(tmp_path / "quantized", tmp_path / "file", "gguf")
    _, tensors = _read(tmp_path / "file")
    assert tensors["token_embd.weight"].tensor_type.name == "BF16"
    assert torch.equal(_values(tensors["token_embd.weight"]), model.model.embed_tokens.weight.float())
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == "BF16"
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_rounding_is_asked_for_and_stated(made, tmp_path) -> None:
    quantized, directory = made("llama-asym")
    with pytest.raises(FormatError, match=r"model\.layers\.0\.\S+ cannot be converted exactly: .* --round-scales"):
        convert(quantized, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
    command = ["convert", str(quantized), str(tmp_path / "out"), "--to", "gguf", "--round-scales", "--json"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    done = json.loads(run.stdout)
    stated = _read(tmp_path / "out")[0]["hf_quant.rounding"]
    assert done["exact"] is False and done["layers"] == 28 and stated in done["notes"]
    assert "of its step" in stated and stated == _read(directory)[0]["hf_quant.rounding"]


def test_the_command_says_exactly_and_overwrites_its_own(made, tmp_path) -> None:
    quantized, _ = made("llama")
    for options in ([], ["--overwrite"]):
        run = CliRunner().invoke(app, ["convert", str(quantized), str(tmp_path / "new"), "--to", "gguf", *options])
        assert run.exit_code == 0, run.output
        assert "28 layers from compressed-tensors to gguf, exactly" in run.output
        assert "new-Q4_0.gguf" in run.output


def test_a_window_is_noted(made, tmp_path) -> None:
    quantized, _ = made("mistral-int8")
    shutil.copytree(quantized, tmp_path / "windowed")
    config = json.loads((tmp_path / "windowed" / "config.json").read_text())
    (tmp_path / "windowed" / "config.json").write_text(json.dumps({**config, "sliding_window": 16}))
    assert any("a window of 16" in note for note in convert(tmp_path / "windowed", tmp_path / "out", "gguf").notes)


@pytest.mark.parametrize(
    ("kind", "settings", "quantization", "match"),
    [
        ("gpt2", {}, {"grid": "nf4", "group_size": 64}, r"GPT2LMHeadModel \(gpt2\) cannot be written as GGUF"),
        ("gemma2", {"head_dim": 16}, {}, r"Gemma2ForCausalLM \(gemma2\) cannot be written as GGUF"),
        ("llama", {}, {"grid": "nf4"}, "GGUF has no nf4 blocks"),
        ("llama", {}, {"group_size": 16}, "groups of 16 columns are not whole blocks"),
        ("llama", {"hidden_act": "gelu"}, {}, "hidden_act='gelu'"),
        ("qwen2", {"rope_parameters": LLAMA3}, {}, "rope_type='llama3'"),
        ("qwen3", {"attention_bias": True}, {}, r"o_proj\.bias has no place in llama\.cpp's qwen3"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, {}, "every fourth layer"),
    ],
)
def test_what_llama_cpp_would_not_compute_is_refused(kind, settings, quantization, match, tmp_path) -> None:
    config = AutoConfig.for_model(kind, **{**COMMON, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    hf_quant.quantize(model, HfQuantConfig(method="absmax", **quantization), tmp_path / "quantized")
    with pytest.raises(FormatError, match=match):
        convert(tmp_path / "quantized", tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_bad_requests(made, tmp_path) -> None:
    quantized, _ = made("llama")
    with pytest.raises(ConfigError, match="awq rounds no scales"):
        convert(quantized, tmp_path / "out", "awq", round_scales=True)
    shutil.copytree(quantized, tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json and no tokenizer\.model"):
        convert(tmp_path / "mute", tmp_path / "out", "gguf")
