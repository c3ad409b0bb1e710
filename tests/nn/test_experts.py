"""Fused experts taken apart: the same outputs and names, put together again, and what cannot be taken apart."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_quant.nn.experts import LEAVES, Layout, Routed, SplitExperts
from hf_quant.nn.splitting import (
    expanded_modules,
    experts_apart,
    fuse_experts,
    is_fused,
    layout_of,
    left_fused,
    split_experts,
    split_modules,
    stock_experts,
)

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
# model type -> its settings, names of gate, up and down, and what is special about its layout
KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...], set[str]]] = {
    "mixtral": ({"num_local_experts": 4}, ("w1", "w3", "w2"), {"gated"}),
    "qwen3_moe": ({"num_experts": 4, "moe_intermediate_size": 24}, LEAVES, {"gated"}),
    "gpt_oss": ({"num_local_experts": 4}, LEAVES, {"gated", "transposed", "interleaved", "biased"}),
    "granitemoe": ({"num_local_experts": 4}, LEAVES, {"gated"}),
    "llama4_text": ({"num_local_experts": 4, "num_experts_per_tok": 1}, LEAVES, {"gated", "transposed", "batched"}),
}
IDS = torch.arange(20).view(2, 10)


def _model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind][0]}, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_apart_they_do_the_same_and_together_they_are_what_they_were(kind: str) -> None:
    model = _model(kind)
    exact, before = _logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    expanded = {name: type(module) for name, module in expanded_modules(model)}
    fused = [name for name, module in model.named_modules() if is_fused(module)]
    assert split_experts(model) == fused == list(split_modules(model)) and len(fused) == 2
    apart = split_modules(model)
    for module in apart.values():
        layout, (_, leaves, special) = module.layout, KINDS[kind]
        assert module.leaves == leaves
        assert {name for name in vars(layout) if vars(layout)[name] is True} == special
        assert (layout.experts, layout.hidden) == (4, 32)
    # what is planned beforehand has the names that come out
    assert expanded == {name: type(module) for name, module in model.named_modules()}
    torch.testing.assert_close(_logits(model), exact, rtol=1e-5, atol=1e-5)
    fuse_experts(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(_logits(model), exact)


def test_no_weight_is_copied() -> None:
    model = _model("mixtral")
    experts = model.model.layers[0].mlp.experts
    storage = experts.gate_up_proj.untyped_storage().data_ptr()
    split_experts(model)
    gate = model.get_submodule("model.layers.0.mlp.experts.3.w1")
    assert gate.weight.untyped_storage().data_ptr() == storage


def test_copies_and_pickles() -> None:
    model = _model("gpt_oss")
    split_experts(model)
    exact = _logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(_logits(other), exact)
        other.model.layers[0].mlp.experts.get_submodule("0").down_proj.weight.data.zero_()
        assert torch.equal(_logits(model), exact)


def test_only_experts_that_are_asked_run_and_know_their_tokens() -> None:
    experts = _model("qwen3_moe").model.layers[0].mlp.experts
    found = layout_of(experts)
    assert isinstance(found, Layout)
    split = SplitExperts(experts, found)
    seen: dict[int, list[int]] = {}

    def note(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[index] = Routed.of(args[0]).rows.tolist()

        return hook

    for index, place, layer in split.linears():
        if place == 2:
            layer.register_forward_pre_hook(note(index))
    x, weights = torch.randn(3, 32), torch.rand(3, 2)
    # 4 is no expert: a token of another rank
    out = split(x, torch.tensor([[0, 2], [2, 4], [4, 4]]), weights)
    assert seen == {0: [0], 2: [0, 1]}
    assert torch.equal(out[2], torch.zeros(32)) and out[:2].abs().sum() > 0


def test_gradients_reach_the_inputs_and_the_routing() -> None:
    model = _model("mixtral").requires_grad_(True)
    split_experts(model)
    model(IDS).logits.square().sum().backward()
    for name in ("model.layers.0.mlp.experts.0.w1.weight", "model.layers.0.mlp.gate.weight"):
        assert model.get_parameter(name).grad.abs().sum() > 0


def test_what_goes_wrong_leaves_the_model_whole() -> None:
    model = _model("mixtral")
    exact = _logits(model)
    with pytest.raises(RuntimeError, match="stop"), experts_apart(model, ["model.layers.0.mlp.experts.0.w1"]):
        assert split_modules(model)
        raise RuntimeError("stop")
    assert not split_modules(model) and torch.equal(_logits(model), exact)


def test_they_stay_together_when_nothing_in_them_is_wanted() -> None:
    model = _model("mixtral")
    assert split_experts(model, ["model.layers.0.self_attn.q_proj"]) == []
    assert len(split_experts(model, ["model.layers.1.mlp.experts.2.w2"])) == 2


class _Odd(nn.Module):
    """Experts that look like those of others and compute something else."""

    def __init__(self, extra: bool = False) -> None:
        super().__init__()
        self.num_experts = 3
        self.gate_up_proj = nn.Parameter(torch.randn(3, 16, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 8))
        self.act_fn = nn.SiLU()
        if extra:
            self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self.gate_up_proj[0].t()).chunk(2, -1)
        return (self.act_fn(gate) * up) @ self.down_proj[0].t()


def test_what_was_not_understood_stays_and_says_why() -> None:
    model = nn.ModuleDict({"odd": _Odd(), "extra": _Odd(extra=True)})
    assert "does not give the same outputs" in left_fused(model["odd"])
    assert "parameters besides those of its experts (scale)" in left_fused(model["extra"])
    assert split_experts(model) == []
    assert [name for name, _ in expanded_modules(model)] == [name for name, _ in model.named_modules()]


@pytest.mark.parametrize(
    ("kind", "expected", "in_float"),
    [("mixtral", "merged", "float"), ("gpt_oss", "apart", ""), ("llama4_text", "", "")],
)
def test_what_stock_loaders_make_of_them(kind: str, expected: str, in_float: str) -> None:
    model = _model(kind)
    names = [name for name, module in expanded_modules(model) if isinstance(module, nn.Linear)]
    assert stock_experts(model, names) == expected
    assert stock_experts(model, [name for name in names if "experts" not in name]) == in_float
    split_experts(model)
    assert stock_experts(model, names) == expected
