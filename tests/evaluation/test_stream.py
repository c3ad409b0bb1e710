"""Streamed logits equal the plain forward's, for every way in which architectures treat their logits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_quant.errors import EvaluationError
from hf_quant.evaluation.stream import LogitStream, chunks

_SHAPE = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# The second item of each makes a stream that forgets the post-processing visibly wrong.
_POST_PROCESSED = {
    "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 16, "query_pre_attn_scalar": 16},
    "granite": {"logits_scaling": 7.0},
    "cohere": {"logit_scale": 0.25},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 2},
}


def _stretch(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that soft-capping bends the logits and experts differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
    return model


def _check(model: torch.nn.Module) -> LogitStream:
    ids = torch.randint(3, 384, (1, 33))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
    stream = LogitStream(model, "the model")
    hidden = stream.hidden(ids)
    actual = torch.cat([stream.logits(hidden, start, stop) for start, stop in chunks(33, 7)])
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[0], expected, rtol=0, atol=0)
    return stream


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "mistral", "gpt2", "opt", "phi"])
def test_streams_every_supported_architecture(tiny_model, architecture):
    stream = _check(_stretch(tiny_model(architecture)))
    assert not stream.reruns_backbone


@pytest.mark.parametrize("architecture", sorted(_POST_PROCESSED))
def test_streams_post_processed_logits(architecture):
    config = AutoConfig.for_model(architecture, **{**_SHAPE, **_POST_PROCESSED[architecture]})
    model = _stretch(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    stream = _check(model)
    assert not stream.reruns_backbone
    if architecture == "gemma2":
        ids = torch.randint(3, 384, (1, 9))
        hidden = stream.hidden(ids)
        assert stream.logits(hidden, 0, 9).abs().max() <= 0.5, "soft-capping was lost"


def test_backbone_runs_once_per_window(tiny_model):
    model = tiny_model("llama")
    stream = LogitStream(model, "the model")
    runs = []
    model.model.layers[0].register_forward_hook(lambda *args: runs.append(1))
    hidden = stream.hidden(torch.randint(3, 384, (1, 40)))
    for start, stop in chunks(40, 5):
        assert stream.logits(hidden, start, stop).shape == (stop - start, 384)
    assert len(runs) == 1


def test_head_never_sees_more_than_a_chunk(tiny_model):
    model = tiny_model("gemma3_text")
    stream = LogitStream(model, "the model")
    rows = []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    hidden = stream.hidden(torch.randint(3, 384, (1, 40)))
    for start, stop in chunks(40, 8):
        stream.logits(hidden, start, stop)
    assert rows == [1, 8, 8, 8, 8, 8]


class _Wrapped(torch.nn.Module):
    """A model whose forward does something after its backbone that depends on all positions, or before its head."""

    def __init__(self, inner: torch.nn.Module, across_positions: bool) -> None:
        super().__init__()
        self.inner = inner
        self.across_positions = across_positions

    dtype = torch.float32

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, input_ids, use_cache=False):
        hidden = self.inner.model(input_ids=input_ids, use_cache=use_cache)[0]
        hidden = hidden * torch.linspace(1, 2, input_ids.shape[1])[None, :, None]  # breaks chunks of the backbone
        logits = self.inner.lm_head(hidden)
        if self.across_positions:
            logits = logits - logits.mean(dim=1, keepdim=True)
        return type("Output", (), {"logits": logits})()


def test_reruns_the_model_where_its_backbone_cannot_be_replayed(tiny_model):
    stream = _check(_Wrapped(tiny_model("llama"), across_positions=False))
    assert stream.reruns_backbone


def test_refuses_a_head_that_mixes_positions(tiny_model):
    with pytest.raises(EvaluationError, match="cannot be streamed"):
        LogitStream(_Wrapped(tiny_model("llama"), across_positions=True), "the model")


def test_leaves_hooks_of_others_alone(tiny_model):
    """accelerate keeps its dispatch in the instance's ``forward``; a stub must put it back."""
    model = tiny_model("llama")
    own = model.model.forward
    model.model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    hooked = model.model.forward
    _check(model)
    assert model.model.forward is hooked
    del model.model.forward
    _check(model)
    assert "forward" not in model.model.__dict__
