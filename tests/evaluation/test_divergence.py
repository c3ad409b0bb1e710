"""The streamed figures equal their textbook definitions on full float64 logits."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hf_quant.errors import EvaluationError
from hf_quant.evaluation import stream as stream_module
from hf_quant.evaluation.bootstrap import Bootstrap
from hf_quant.evaluation.divergence import compare, run_reference
from hf_quant.evaluation.stream import LogitStream


def _disturbed(model: torch.nn.Module, amount: float = 0.3) -> torch.nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(amount * parameter.std() * torch.randn_like(parameter))
    return other


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "opt", "qwen3", "phi"])
def test_equals_the_definition(tiny_model, architecture, monkeypatch):
    monkeypatch.setattr(stream_module, "CHUNK_BYTES", 5 * 384 * 4)  # chunks of 5 positions: 24 do not divide evenly
    model = tiny_model(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    other = _disturbed(model)
    ids = torch.randint(3, 384, (3, 25))
    result = compare(run_reference(LogitStream(model, "a"), ids), LogitStream(other, "b"))

    with torch.no_grad():
        p = torch.log_softmax(model(input_ids=ids).logits.double(), -1)[:, :-1]
        q = torch.log_softmax(other(input_ids=ids).logits.double(), -1)[:, :-1]
    kl = (p.exp() * (p - q)).sum(-1)
    targets = ids[:, 1:, None]
    np.testing.assert_allclose(result.kl, kl, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(result.nll_reference, -p.gather(-1, targets)[..., 0], rtol=1e-4)
    np.testing.assert_allclose(result.nll_model, -q.gather(-1, targets)[..., 0], rtol=1e-4)
    np.testing.assert_array_equal(result.agree, p.argmax(-1) == q.argmax(-1))
    assert result.kl_p99 == pytest.approx(float(np.quantile(kl, 0.99)), rel=1e-3)

    summary = result.summary(Bootstrap(3, 200, 0))
    assert summary.kl.value == pytest.approx(float(kl.mean()), rel=1e-3)
    assert summary.kl.value > 1e-4, "the disturbance is too small for this test to mean anything"
    losses = [float(-x.gather(-1, targets).mean()) for x in (p, q)]
    assert summary.perplexity_reference.value == pytest.approx(np.exp(losses[0]), rel=1e-4)
    assert summary.perplexity_model.value == pytest.approx(np.exp(losses[1]), rel=1e-4)
    increase = 100 * (np.exp(losses[1] - losses[0]) - 1)
    assert summary.perplexity_increase_percent.value == pytest.approx(increase, rel=1e-2, abs=1e-3)


def test_a_model_does_not_diverge_from_itself(tiny_model):
    model = tiny_model("llama")
    stream = LogitStream(model, "a")
    result = compare(run_reference(stream, torch.randint(3, 384, (2, 20))), stream)
    assert result.kl.max() == 0.0
    assert result.agree.all()
    assert result.summary(Bootstrap(2, 50, 0)).perplexity_increase_percent.value == 0.0


def test_masked_vocabulary_entries_do_not_count(tiny_model):
    model = tiny_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(384))
    with torch.no_grad():
        model.lm_head.bias[380:] = -torch.inf
    ids = torch.randint(3, 380, (2, 20))
    other = _disturbed(model, 0.0)
    with torch.no_grad():
        other.lm_head.bias[:380].normal_()
        other.lm_head.bias[380:] = -torch.inf
    result = compare(run_reference(LogitStream(model, "a"), ids), LogitStream(other, "b"))
    assert np.isfinite(result.kl).all()
    assert result.kl.min() > 0


def test_logits_that_are_not_numbers_are_an_error(tiny_model):
    model = tiny_model("llama")
    stream = LogitStream(model, "the candidate")
    reference = run_reference(LogitStream(copy.deepcopy(model), "the reference"), torch.randint(3, 384, (2, 20)))
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(EvaluationError, match="the candidate gives a loss that is not finite in window 0"):
        compare(reference, stream)


def test_vocabularies_must_match(tiny_model):
    reference = run_reference(LogitStream(tiny_model("llama"), "a"), torch.randint(3, 300, (2, 20)))
    with pytest.raises(EvaluationError, match="400 logits per token"):
        compare(reference, LogitStream(tiny_model("llama", vocab_size=400), "b"))


def test_memory_is_bounded_for_a_large_vocabulary(tiny_model, monkeypatch):
    """No tensor of logits larger than a chunk is ever made, whatever the vocabulary and the window."""
    monkeypatch.setattr(stream_module, "CHUNK_BYTES", 2**20)
    vocabulary = 32_768
    model = tiny_model("llama", vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    other_model = _disturbed(model)
    weights = {p.untyped_storage().data_ptr() for m in (model, other_model) for p in m.parameters()}
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim >= 2 and out.shape[-1] == vocabulary:
                storage = out.untyped_storage()
                if storage.data_ptr() not in weights:
                    largest = max(largest, storage.nbytes())
            return out

    reference, other = LogitStream(model, "a"), LogitStream(other_model, "b")
    ids = torch.randint(3, vocabulary, (2, 200))
    with Watch():
        compare(run_reference(reference, ids), other)
    assert 0 < largest <= 2**20 < 200 * vocabulary * 4
