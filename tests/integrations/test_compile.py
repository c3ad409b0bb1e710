"""torch.compile and the fused decoder: nothing compiles by itself where native code runs, and asking for it works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.nn.fused import FusedForward
from hf_quant.nn.switching import switch

IDS = torch.arange(3, 13).view(1, 10)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}


@pytest.fixture
def model(tiny_model) -> Any:
    config = HfQuantConfig(group_size=32, overrides={"embed_tokens": {}})
    return hf_quant.quantize(tiny_model("llama", initializer_range=0.3), config)


def test_a_static_cache_alone_compiles_nothing(model, monkeypatch) -> None:
    def compiled(*args: Any) -> Any:
        raise AssertionError("generate compiled a model on a CPU by itself")

    monkeypatch.setattr(type(model), "get_compiled_call", compiled)
    with switch(False):
        expected = model.generate(IDS, **GREEDY)
    assert torch.equal(model.generate(IDS, **GREEDY), expected)
    forward = model.model.__dict__.get("forward")
    assert isinstance(forward, FusedForward)


def test_asked_for_it_compiles_and_gives_the_same_tokens(model) -> None:
    expected = model.generate(IDS, **GREEDY)
    asked = CompileConfig(fullgraph=True, backend="eager", mode=None)
    asked._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(model.generate(IDS, compile_config=asked, **GREEDY), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_forward_has_no_graph_break(model) -> None:
    with torch.no_grad():
        expected = model(IDS).logits
        torch._dynamo.reset()
        found = torch.compile(model, fullgraph=True, backend="eager")(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
