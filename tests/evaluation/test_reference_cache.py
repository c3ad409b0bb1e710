"""The reference cache: its estimate is unbiased, its other figures are exact, its files are trusted only when whole."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hf_quant.errors import EvaluationError, OutputError
from hf_quant.evaluation import compressed as module
from hf_quant.evaluation import evaluate
from hf_quant.evaluation import stream as stream_module
from hf_quant.evaluation.compressed import compare_compressed, compress
from hf_quant.evaluation.divergence import compare, run_reference
from hf_quant.evaluation.sources import Origin, opened
from hf_quant.evaluation.stream import LogitStream

TEXT = "the quick brown fox jumps over the lazy dog because it can, and the dog may not. " * 60
SETTINGS = {"windows": 4, "length": 33, "bootstrap_samples": 100, "progress": False, "depth": False, "speed": False}


@pytest.fixture
def pair(tiny_model):
    """A model and one that differs from it, on 6 windows of 40 tokens."""
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # probabilities that are not all alike
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
    return model, other, torch.randint(3, 384, (6, 41))


def both(pair, seed=0):
    model, other, ids = pair
    reference = run_reference(LogitStream(model, "a"), ids)
    candidate = LogitStream(other, "b")
    return compare(reference, candidate), compare_compressed(compress(reference, seed), candidate)


def test_all_but_the_divergence_is_exact(pair, monkeypatch):
    monkeypatch.setattr(stream_module, "CHUNK_BYTES", 7 * 384 * 4)
    exact, estimated = both(pair)
    np.testing.assert_array_equal(estimated.nll_reference, exact.nll_reference)
    np.testing.assert_array_equal(estimated.nll_model, exact.nll_model)
    np.testing.assert_array_equal(estimated.agree, exact.agree)
    np.testing.assert_allclose(estimated.confidence, exact.confidence, rtol=1e-6)


def test_the_estimate_has_the_error_that_it_states(pair, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 8)
    monkeypatch.setattr(module, "DRAWN", 8)
    means, errors = [], []
    for seed in range(60):
        exact, estimated = both(pair, seed)
        assert (estimated.kl >= 0).all()
        means.append(estimated.kl.mean())
        errors.append(estimated.kl_error)
    truth = exact.kl.mean()
    assert exact.kl_error is None
    spread = np.std(means, ddof=1)
    assert spread > 1e-4 * truth, "the tail is too thin for this test to mean anything"
    assert abs(np.mean(means) - truth) < 4 * spread / np.sqrt(len(means)), "biased"
    assert 0.6 < np.mean(errors) / (1.96 * spread) < 1.6
    inside = np.mean([abs(mean - truth) <= error for mean, error in zip(means, errors, strict=True)])
    assert inside > 0.8


def test_the_kept_tokens_alone_would_miss_some(pair, monkeypatch):
    """What the draws are for: all other tokens as one give a lower bound."""
    monkeypatch.setattr(module, "KEPT", 8)
    exact, estimated = both(pair)
    model, other, ids = pair
    with torch.no_grad():
        p, q = (torch.softmax(m(input_ids=ids).logits.double(), -1)[:, :-1] for m in (model, other))
    kept = p.topk(8, dim=-1).indices
    lumped = [torch.cat((x.gather(-1, kept), 1 - x.gather(-1, kept).sum(-1, keepdim=True)), -1) for x in (p, q)]
    bound = (lumped[0] * (lumped[0] / lumped[1]).log()).sum(-1).mean()
    assert bound < 0.98 * exact.kl.mean()
    assert abs(estimated.kl.mean() - exact.kl.mean()) < 0.5 * (exact.kl.mean() - bound)


def test_a_vocabulary_that_is_kept_whole_is_exact(pair, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 384)
    exact, estimated = both(pair)
    np.testing.assert_allclose(estimated.kl, exact.kl, rtol=1e-4, atol=1e-7)
    assert estimated.kl_error == 0


def test_impossible_tokens_weigh_nothing(pair):
    """A head that masks most of its vocabulary leaves no tail to draw from."""
    model, other, ids = pair
    for one in (model, other):
        one.register_forward_hook(_masking)
    exact, estimated = both((model, other, ids % 20))
    assert np.isfinite(estimated.kl).all()
    np.testing.assert_allclose(estimated.kl, exact.kl, rtol=1e-4, atol=1e-7)


def _masking(module, args, output):
    output.logits = torch.cat((output.logits[..., :20], torch.full_like(output.logits[..., 20:], -torch.inf)), dim=-1)
    return output


def test_the_second_candidate_needs_no_float_model(tiny_checkpoint, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    reference, candidate = tiny_checkpoint("llama"), tiny_checkpoint("llama", seed=1)
    settings = SETTINGS | {"texts": [text], "reference_cache": tmp_path / "new" / "cache"}
    exact = evaluate(candidate, reference, **(settings | {"reference_cache": None}))
    first = evaluate(candidate, reference, **settings)
    loaded = []
    load = Origin.load

    def watched(self, *args):
        loaded.append(self.directory)
        return load(self, *args)

    monkeypatch.setattr(Origin, "load", watched)
    second = evaluate(candidate, reference, **settings)
    assert set(loaded) == {candidate}
    assert second.texts == first.texts
    assert second.size == first.size == exact.size
    assert (second.protocol.kept_tokens, second.protocol.drawn_tokens) == (64, 64)
    assert exact.protocol.kept_tokens is None and exact.texts[0].kl_error is None
    found, known = second.texts[0], exact.texts[0]
    assert found.perplexity_quantized == known.perplexity_quantized
    assert found.top1_agreement == known.top1_agreement
    assert abs(found.kl.value - known.kl.value) < 3 * found.kl_error
    assert found.noise_floor is not None

    loaded.clear()
    evaluate(candidate, reference, **(settings | {"seed": 1}))
    assert reference in loaded, "other windows were never met"
    loaded.clear()
    evaluate(candidate, tiny_checkpoint("llama", seed=2), **settings)
    assert tiny_checkpoint("llama", seed=2) in loaded, "another float model"


def test_files_that_are_not_whole_are_refused(tiny_checkpoint, tmp_path):
    text, cache = tmp_path / "text.txt", tmp_path / "cache"
    text.write_text(TEXT)
    reference, candidate = tiny_checkpoint("llama"), tiny_checkpoint("llama", seed=1)
    settings = SETTINGS | {"texts": [text], "reference_cache": cache, "noise_floor": False}
    evaluate(candidate, reference, **settings)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for broken in (whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], b"", b"no"):
        file.write_bytes(broken)
        with pytest.raises(EvaluationError, match=r"no file of a reference cache.*remove it"):
            evaluate(candidate, reference, **settings)
    file.unlink()
    evaluate(candidate, reference, **settings)
    assert file.read_bytes() == whole, "what is drawn depends on the seed alone"
    with pytest.raises(OutputError, match="cannot be made"):
        evaluate(candidate, reference, **(settings | {"reference_cache": text}))


def test_bytes_are_counted_on_the_skeleton(tiny_checkpoint):
    for architecture in ("llama", "gemma3_text", "gpt2"):
        directory = tiny_checkpoint(architecture)
        with opened(directory, "reference") as origin:
            model = origin.load(torch.bfloat16, "cpu")
            plain = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
            assert origin.memory_bytes(torch.bfloat16) == plain
