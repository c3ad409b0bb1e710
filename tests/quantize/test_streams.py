"""A forward pass that stops at every layer: the same numbers as the plain one, and nothing left behind."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_quant.quantize.blocks import find_blocks
from hf_quant.quantize.streams import Stream, Trace, watched

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(kind: str, auto: type = AutoModelForCausalLM, **changes) -> nn.Module:
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes})).eval()


def ids(seed: int, rows: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def linears(model: nn.Module, *leaves: str) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and (not leaves or name.endswith(leaves))
    ]


def answer(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    weight = module.weight.t() if type(module).__name__ == "Conv1D" else module.weight
    return linear(inputs, weight, module.bias)


@torch.no_grad()
def test_batches_in_lock_step_give_the_plain_outputs() -> None:
    model = build("llama")
    layers = linears(model, "_proj")
    batches = [ids(0), ids(1, 3, 7), ids(2, 1, 20)]
    plain = [model(batch).logits for batch in batches]
    found: dict[int, torch.Tensor] = {}
    order = []
    with watched(model, layers):
        streams = [Stream(lambda i=i: found.update({i: model(batches[i]).logits})) for i in range(3)]
        for stream in streams:
            stream.advance()
        while streams[0].layer is not None:
            name = streams[0].layer
            order.append(name)
            assert {stream.layer for stream in streams} == {name}
            for stream, batch in zip(streams, batches, strict=True):
                assert stream.inputs.shape[:2] == batch.shape
                stream.advance(answer(model.get_submodule(name), stream.inputs))
    assert [stream.layer for stream in streams] == [None] * 3
    assert order == layers  # of a Llama they run in the order in which they are defined
    assert all(torch.equal(found[i], plain[i]) for i in range(3))


@torch.no_grad()
def test_layers_that_read_one_input_are_handed_the_same_tensor() -> None:
    model = build("llama")
    layers = linears(model, "_proj")
    seen = {}
    with watched(model, layers):
        stream = Stream(lambda: model(ids(0)))
        stream.advance()
        while stream.layer is not None:
            name = stream.layer
            seen[name.removeprefix("model.layers.")] = stream.inputs
            stream.advance(answer(model.get_submodule(name), stream.inputs))
    assert seen["0.self_attn.q_proj"] is seen["0.self_attn.v_proj"]
    assert seen["0.mlp.gate_proj"] is seen["0.mlp.up_proj"]
    assert seen["0.self_attn.q_proj"] is not seen["1.self_attn.q_proj"]


@torch.no_grad()
def test_an_exception_in_the_model_reaches_the_caller_and_everything_is_put_back() -> None:
    model = build("llama")
    before = model(ids(0)).logits
    with pytest.raises(IndexError), watched(model, linears(model, "_proj")):
        Stream(lambda: model(torch.full((1, 4), 9999))).advance()
    # one that comes later than the first stop, with another stream in the middle of its way
    with pytest.raises(RuntimeError, match="shape"), watched(model, linears(model, "_proj")):
        other = Stream(lambda: model(ids(1)))
        other.advance()
        stream = Stream(lambda: model(ids(0)))
        stream.advance()
        stream.advance(torch.zeros(2, 10, 7))
    other.close()
    assert other.layer is None and other.inputs is None
    other.close()
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(ids(0)).logits, before)


@torch.no_grad()
def test_a_stream_that_is_closed_leaves_through_the_finally_clauses_of_the_model() -> None:
    model = build("llama")
    left = []
    inner = model.model.forward

    def forward(self: nn.Module, *args, **kwargs):
        try:
            return inner(*args, **kwargs)
        finally:
            left.append(True)

    model.model.forward = MethodType(forward, model.model)
    with watched(model, linears(model, "_proj")):
        stream, unstarted = Stream(lambda: model(ids(0))), Stream(lambda: model(ids(0)))
        stream.advance()
        assert not left
        stream.close()
        unstarted.close()
    assert left == [True]


@torch.no_grad()
def test_a_forward_that_somebody_else_put_there_is_put_back() -> None:
    """accelerate's hooks replace ``forward`` on the instance."""
    model = build("llama")
    layer = model.model.layers[0].mlp.up_proj
    inner = layer.forward
    layer.forward = lambda x: 2 * inner(x)
    before = model(ids(0)).logits
    with watched(model, linears(model, "_proj")):
        pass
    assert torch.equal(model(ids(0)).logits, before)


# --- residual streams ---


def learn(model: nn.Module, batch: dict[str, torch.Tensor], block: int = 0) -> tuple[Trace, dict[str, torch.Tensor]]:
    """Run one batch with a learning trace; what it found, and the residual streams of a second, following run."""
    layers = [name for name in linears(model) if ".lm_head" not in f".{name}" and "embed_out" not in name]
    blocks = {b.name: b for b in find_blocks(model, layers)}
    trace = Trace({}, set(), learn=True)
    _drive(model, layers, batch, trace, blocks)
    here = list(blocks)[block]
    mine = {name: r for name, r in trace.found.items() if name.startswith(here + ".")}
    following = Trace(mine, set())
    streams = _drive(model, layers, batch, following, blocks)
    assert not following.lost
    return trace, {name.removeprefix(here + "."): streams[name] for name in mine if name in streams}


def _drive(model, layers, batch, trace, blocks) -> dict[str, torch.Tensor]:
    found, streams = {}, []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: streams[0].enter(name, args[0])
        )
        for name in blocks
    ]
    with torch.no_grad(), watched(model, layers):
        streams.append(Stream(lambda: model(**batch), trace))
        stream = streams[0]
        stream.advance()
        while stream.layer is not None:
            if stream.residual is not None:
                found[stream.layer] = stream.residual.clone()
            stream.advance(answer(model.get_submodule(stream.layer), stream.inputs))
    for hook in hooks:
        hook.remove()
    return found


def capture(model: nn.Module, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first input of a module in a plain pass."""
    seen = []
    hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("kind", "attention", "mlp", "first", "second"),
    [
        ("llama", "self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
        ("gpt2", "attn.c_proj", "mlp.c_proj", "ln_1", "ln_2"),
        ("opt", "self_attn.out_proj", "fc2", "self_attn_layer_norm", "final_layer_norm"),
    ],
)
def test_layers_that_add_to_the_stream_are_found(kind, attention, mlp, first, second) -> None:
    changes = {
        "gpt2": {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4},
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    }
    model = build(kind, **changes.get(kind, {}))
    batch = {"input_ids": ids(0)}
    trace, residuals = learn(model, batch, 1)
    assert set(residuals) == {attention, mlp}
    block = next(m for n, m in model.named_modules() if n.endswith(".1") and hasattr(m, first))
    # in these models the stream is what the norms before attention and MLP read
    assert torch.equal(residuals[attention], capture(model, getattr(block, first), batch))
    assert torch.equal(residuals[mlp], capture(model, getattr(block, second), batch))
    # every block was learnt from, and the numbers are those of the block, not of the model
    assert trace.found[next(n for n in trace.found if ".0." in n)] in [r for n, r in trace.found.items() if ".1." in n]


def test_bert_adds_before_its_norms() -> None:
    model = build("bert", AutoModel)
    batch = {"input_ids": ids(0), "attention_mask": torch.ones(2, 10, dtype=torch.int64)}
    _, residuals = learn(model, batch)
    assert set(residuals) == {"attention.output.dense", "output.dense"}
    block = model.encoder.layer[0]
    assert torch.equal(residuals["attention.output.dense"], capture(model, block, batch))
    assert torch.equal(residuals["output.dense"], capture(model, block.intermediate.dense, batch))


def test_a_parallel_residual_is_not_made_up_for_twice() -> None:
    model = build("gpt_neox", use_parallel_residual=True)
    _, residuals = learn(model, {"input_ids": ids(0)})
    assert len(residuals) < 2
    sequential = build("gpt_neox", use_parallel_residual=False)
    _, residuals = learn(sequential, {"input_ids": ids(0)})
    assert set(residuals) == {"attention.dense", "mlp.dense_4h_to_h"}


def test_a_norm_after_the_layer_hides_the_stream() -> None:
    model = build("gemma2", head_dim=8)
    trace, residuals = learn(model, {"input_ids": ids(0)})
    assert not trace.found and not residuals


def test_a_block_that_takes_another_path_is_not_given_a_wrong_stream() -> None:
    """SmolLM3 leaves rotary embeddings out in some layers: torch calls have other numbers there."""
    model = build("smollm3", num_hidden_layers=2, no_rope_layers=[1, 0], layer_types=["full_attention"] * 2)
    batch = {"input_ids": ids(0)}
    layers = linears(model, "_proj")
    blocks = {b.name: b for b in find_blocks(model, layers)}
    trace = Trace({}, set(), learn=True)
    _drive(model, layers, batch, trace, blocks)
    first, second = ("model.layers.0.", "model.layers.1.")
    leaves = ("self_attn.o_proj", "mlp.down_proj")
    learnt = {prefix + leaf: trace.found[first + leaf] for prefix in (first, second) for leaf in leaves}
    following = Trace(learnt, set())
    found = _drive(model, layers, batch, following, blocks)
    assert set(found) == {first + leaf for leaf in leaves}
    assert following.lost == {second + leaf for leaf in leaves}


def test_an_addition_that_is_another_one_is_noticed() -> None:
    model = build("llama")
    trace, _ = learn(model, {"input_ids": ids(0)})
    name = "model.layers.0.self_attn.o_proj"
    right = trace.found[name]
    wrong = Trace({name: type(right)(right.source, right.addition + 1, right.path)}, set())
    layers = linears(model, "_proj")
    _drive(model, layers, {"input_ids": ids(0)}, wrong, {b.name: b for b in find_blocks(model, layers)})
    assert wrong.lost == {name}


# --- blocks ---


def test_blocks_are_the_outermost_members_of_module_lists() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    model = nn.Module()
    model.embed = nn.Linear(4, 4)
    model.layers = nn.ModuleList([Expert(), Expert(), nn.Sequential(nn.Linear(4, 4))])
    model.loose = nn.ModuleList([nn.Linear(4, 4)])
    found = find_blocks(model, linears(model))
    assert [block.name for block in found] == ["layers.0", "layers.1", "layers.2"]
    assert found[0].layers == ("layers.0.experts.0", "layers.0.experts.1")
    assert found[0].kind == found[1].kind != found[2].kind
    assert not find_blocks(model, ["embed", "loose.0"])
