"""Quantized embeddings: looked up exactly, one table for a tied head, saved and loaded, planned and refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.errors import CheckpointError, FormatError, KernelError, PlanError
from hf_quant.grids import Scheme
from hf_quant.kernels import registry
from hf_quant.nn.embedding import QuantEmbedding, SharedHead, embedding_of
from hf_quant.nn.swap import put_float
from hf_quant.plan import make_plan
from hf_quant.quantize.weight import quantize_weight

IDS = torch.arange(3, 27).view(2, 12)
TABLE: dict[str, Any] = {"embed_tokens": {}}
KERNELS = [name for name in ("native", "reference") if registry.get(name).unavailable() is None]


def model(tied: bool = True, seed: int = 0, **more: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=130, tie_word_embeddings=tied, **more)
    return LlamaForCausalLM(config).eval()


def saved(path: Path, tied: bool = True) -> Path:
    model(tied).save_pretrained(path)
    return path


def logits(found: Any) -> torch.Tensor:
    with torch.no_grad():
        return found(IDS).logits


def table_of(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype, kernel: str, seed: int = 0) -> QuantEmbedding:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    float_table = nn.Embedding(rows, columns, dtype=dtype)
    return embedding_of(quantize_weight(weight, scheme, "absmax"), float_table, kernel, registry.FLOAT)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([Scheme("int", 4), Scheme("int", 8), Scheme("int", 4, False), Scheme("int", 8, False, -1)]),
    st.integers(1, 70),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(KERNELS),
    st.integers(0, 5),
)
def test_rows_are_those_of_the_weight_bit_for_bit(scheme, rows, groups, dtype, kernel, count) -> None:
    table = table_of(scheme, rows, 32 * groups, dtype, kernel)
    ids = torch.randint(rows, (2, count), generator=torch.Generator().manual_seed(1))
    found = table(ids)
    assert table.kernel_name == kernel and found.dtype == dtype
    assert torch.equal(found, table.dequantize(dtype)[ids])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ids", [[-1], [7], [0, 100]])
def test_ids_outside_are_refused(kernel, ids) -> None:
    with pytest.raises(IndexError):
        table_of(Scheme(), 7, 32, torch.float32, kernel)(torch.tensor(ids))


@pytest.mark.parametrize("kernel", KERNELS)
def test_traced_without_a_graph_break(kernel) -> None:
    table = table_of(Scheme(), 9, 64, torch.bfloat16, kernel)
    ids = torch.tensor([[0, 8, 3]])
    expected = table(ids)
    assert torch.equal(torch.compile(table, fullgraph=True, backend="eager")(ids), expected)


def test_a_kernel_that_looks_no_rows_up_is_an_error() -> None:
    with pytest.raises(KernelError, match="does not look rows up"):
        table_of(Scheme(), 7, 32, torch.bfloat16, "cpu")(torch.tensor([0]))


@pytest.mark.parametrize("constant", [8.0, 55.4256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_multiplies_as_in_the_float_embedding(constant, dtype) -> None:
    plain = Gemma3TextScaledWordEmbedding(20, 64, 0, embed_scale=constant).to(dtype)
    tensor = quantize_weight(plain.weight.detach(), Scheme("int", 8), "absmax")
    table = embedding_of(tensor, plain, registry.AUTO, registry.FLOAT)
    plain.weight.data = tensor.dequantize(dtype)
    assert torch.equal(table(IDS % 20), plain(IDS % 20))
    again = table.plain(dtype)
    assert type(again) is type(plain) and torch.equal(again(IDS % 20), plain(IDS % 20))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_loaded_in_memory_and_reloaded_alike(tmp_path, tied, bits) -> None:
    config = HfQuantConfig(bits=bits, group_size=32, overrides=TABLE)
    loaded = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "float", tied), quantization_config=config)
    assert isinstance(loaded.model.embed_tokens, QuantEmbedding)
    assert isinstance(loaded.lm_head, SharedHead if tied else nn.Linear)
    assert loaded.dtype == torch.float32 and loaded.device == torch.device("cpu")
    assert loaded.config.tie_word_embeddings == tied
    expected = logits(loaded)
    assert torch.equal(logits(hf_quant.quantize(model(tied), config)), expected)
    hf_quant.save(loaded, tmp_path / "out")
    again = hf_quant.load(tmp_path / "out")
    assert torch.equal(logits(again), expected)
    assert again.config.tie_word_embeddings == tied
    assert next(row for row in hf_quant.inspect_model(again) if row.name == "model.embed_tokens").nbytes > 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {name for name in file.keys() if "lm_head" in name} == (set() if tied else {"lm_head.weight"})  # noqa: SIM118


def test_a_tied_head_has_no_codes_of_its_own() -> None:
    quantized = hf_quant.quantize(model(), HfQuantConfig(group_size=32, overrides=TABLE))
    head, table = quantized.lm_head, quantized.model.embed_tokens
    logits(quantized)
    assert head.weight is table.weight
    row = next(row for row in hf_quant.inspect_model(quantized) if row.name == "lm_head")
    assert row.nbytes == 0 and row.kernel == table.kernel_name
    hidden = torch.randn(3, 64)
    torch.testing.assert_close(head(hidden), hidden @ table.dequantize().t(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_copies_moves_and_float_models_compute_the_same(tied) -> None:
    quantized = hf_quant.quantize(model(tied), HfQuantConfig(bits=8, overrides=TABLE))
    expected = logits(quantized)
    twin = copy.deepcopy(quantized)
    assert torch.equal(logits(twin), expected)
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == tied
    assert twin.model.embed_tokens.weight is not quantized.model.embed_tokens.weight
    half = twin.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.model.embed_tokens(IDS).dtype == torch.bfloat16
    torch.testing.assert_close(logits(half).float(), expected, rtol=0.05, atol=0.05)
    put_float(quantized, torch.float32)
    assert type(quantized.model.embed_tokens) is nn.Embedding and type(quantized.lm_head) is nn.Linear
    assert (quantized.lm_head.weight is quantized.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(quantized), expected, rtol=1e-4, atol=1e-5)


def test_state_dicts_hold_one_canonical_table() -> None:
    quantized = hf_quant.quantize(model(), HfQuantConfig(group_size=32, overrides=TABLE))
    logits(quantized)
    state = quantized.model.embed_tokens.state_dict()
    assert set(state) == {"weight", "weight_scale"} and state["weight"].shape == (130, 32)
    other = hf_quant.quantize(model(seed=1), HfQuantConfig(group_size=32, overrides=TABLE))
    other.model.embed_tokens.load_state_dict(state)
    assert torch.equal(other.model.embed_tokens(IDS), quantized.model.embed_tokens(IDS))


def test_a_model_of_gemma_keeps_its_constant(tmp_path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3TextConfig(**sizes, num_key_value_heads=1, head_dim=32, vocab_size=96, max_position_embeddings=64)
    float_model = AutoModelForCausalLM.from_config(config).eval()
    float_model.save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=HfQuantConfig(bits=8, overrides=TABLE)
    )
    assert isinstance(quantized.lm_head, SharedHead) and quantized.model.embed_tokens.constant == (8.0, True)
    expected = logits(quantized)
    torch.testing.assert_close(expected, logits(float_model), rtol=0.1, atol=0.05)
    torch.testing.assert_close(logits(quantized.dequantize()), expected, rtol=1e-4, atol=1e-5)


def test_files_that_hold_the_head_too(tmp_path) -> None:
    """A tied model whose files repeat the table for the head loads, unless the two differ."""
    from safetensors.torch import load_file, save_file

    path, config = saved(tmp_path / "float"), HfQuantConfig(group_size=32, overrides=TABLE)
    expected = logits(AutoModelForCausalLM.from_pretrained(path, quantization_config=config))
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, path / "model.safetensors", {"format": "pt"})
    both = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    assert both.lm_head.weight is both.model.embed_tokens.weight
    assert torch.equal(logits(both), expected)
    state["lm_head.weight"] = state["lm_head.weight"].flip(0)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs.*tie_word_embeddings"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


def test_files_of_others_that_pack_both_of_a_tied_pair(tmp_path) -> None:
    config = HfQuantConfig(group_size=32, overrides={**TABLE, "lm_head": {}})
    expected = logits(hf_quant.quantize(model(False), config, tmp_path / "out"))
    settings_file = tmp_path / "out" / "config.json"
    settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "tie_word_embeddings": True}))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_offloaded_to_disk_unless_a_head_shares_it(tmp_path, tied) -> None:
    expected = logits(hf_quant.quantize(model(tied), HfQuantConfig(overrides=TABLE), tmp_path / "out"))
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}

    def load() -> Any:
        more = {"device_map": {**places, "lm_head": "cpu"}, "offload_folder": tmp_path / "disk"}
        return AutoModelForCausalLM.from_pretrained(tmp_path / "out", **more)

    if tied:
        with pytest.raises(CheckpointError, match=r"model.embed_tokens on disk, and lm_head"):
            load()
    else:
        torch.testing.assert_close(logits(load()), expected, rtol=1e-4, atol=1e-5)  # offloaded layers: other kernels


def test_the_plan_lists_both() -> None:
    plan = make_plan(model(), HfQuantConfig(group_size=32, overrides=TABLE, preset="balanced"))
    rows = {layer.name: layer for layer in plan.layers}
    table, head = rows["model.embed_tokens"], rows["lm_head"]
    assert table.scheme == Scheme("int", 4, True, 32) and table.method == "search"
    assert "without data" in table.note and "lm_head" in table.note
    assert head.scheme is None and head.shares == "model.embed_tokens" and head.planned_bytes == 0
    assert plan.shares == {"lm_head": "model.embed_tokens"}
    assert "model.embed_tokens" not in {layer.name for layer in plan.calibrated.quantized}
    assert len(plan.calibrated.quantized) == len(plan.quantized) - 1


@pytest.mark.parametrize(
    ("overrides", "is_planned"),
    [
        ({"model.embed_tokens": {}}, True),
        ({"re:.*embed.*": {"bits": 8}}, True),
        ({"model": {"bits": 8}}, False),  # the name of a subtree
        ({"embed_tokens": "float"}, False),
        ({}, False),
    ],
)
def test_what_names_an_embedding(overrides, is_planned) -> None:
    plan = make_plan(model(False), HfQuantConfig(group_size=32, overrides=overrides))
    assert ("model.embed_tokens" in {layer.name for layer in plan.quantized}) == is_planned


def test_skip_wins_over_patterns() -> None:
    config = HfQuantConfig(group_size=32, overrides={"re:.*embed.*": {}}, skip=["embed_tokens"])
    assert make_plan(model(), config).shares == {}


@pytest.mark.parametrize("head", [{"bits": 8}, "float"])
def test_a_tied_pair_is_one_weight(head) -> None:
    config = HfQuantConfig(group_size=32, overrides={**TABLE, "lm_head": head})
    with pytest.raises(PlanError, match=r"lm_head and model.embed_tokens share one weight"):
        make_plan(model(), config)


def test_the_table_grids_have_no_file_for_it(tmp_path) -> None:
    config = HfQuantConfig(grid="nf4", overrides=TABLE)
    quantized = hf_quant.quantize(model(), config)
    assert torch.isfinite(logits(quantized)).all()
    with pytest.raises(FormatError, match=r"model.embed_tokens cannot be written.*Embedding"):
        hf_quant.save(quantized, tmp_path / "out")
