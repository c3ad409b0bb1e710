"""Depth: every figure equals what the full logits, the modules themselves and generate() give."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_quant.evaluation import EvaluationResult, evaluate
from hf_quant.evaluation import depth_generation as generation
from hf_quant.evaluation import stream as stream_module
from hf_quant.evaluation.bootstrap import Bootstrap
from hf_quant.evaluation.depth_generation import answers, prompt_ids, until_divergence
from hf_quant.evaluation.depth_layers import FUSED_NOTE, has_fused_experts, layer_errors, layer_result
from hf_quant.evaluation.depth_slices import CONFIDENCE_EDGES, text_depth
from hf_quant.evaluation.divergence import Divergence, compare, run_reference
from hf_quant.evaluation.stream import LogitStream


def disturbed(model, amount=0.2, only=""):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if only in name:
                parameter.add_(amount * parameter.std() * torch.randn_like(parameter))
    return other


def sharp(model):
    """Weights so large that the probabilities are not all alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def test_slices_equal_their_definition(tiny_model):
    model = sharp(tiny_model("llama"))
    other = disturbed(model)
    ids = torch.randint(3, 384, (4, 41))
    measured = compare(run_reference(LogitStream(model, "a"), ids), LogitStream(other, "b"))
    with torch.no_grad():
        p = torch.log_softmax(model(input_ids=ids).logits.double(), -1)[:, :-1]
        q = torch.log_softmax(other(input_ids=ids).logits.double(), -1)[:, :-1]
    kl, sure = (p.exp() * (p - q)).sum(-1).numpy(), p.exp().amax(-1).numpy()
    agree = (p.argmax(-1) == q.argmax(-1)).numpy()
    found = text_depth(measured, measured, Bootstrap(4, 50, 0))

    assert len(found.by_confidence) > 1, "the model is too unsure for this test to mean anything"
    assert sum(part.share for part in found.by_confidence) == pytest.approx(1)
    for part in found.by_confidence:
        low, high = map(float, part.name.split("–"))
        assert low in CONFIDENCE_EDGES and high in CONFIDENCE_EDGES
        inside = (sure >= low) & ((sure < high) | (high == 1.0))
        assert part.share == pytest.approx(inside.mean())
        assert part.kl.value == pytest.approx(kl[inside].mean(), rel=1e-3)
        assert part.top1_agreement.value == pytest.approx(agree[inside].mean())
        assert part.kl.low <= part.kl.value <= part.kl.high and part.noise_floor_kl == part.kl
    assert [part.name for part in found.by_position] == ["1", "2–3", "4–7", "8–15", "16–31", "32–40"]
    for part in found.by_position:
        ends = [int(end) for end in part.name.split("–")]
        first, last = ends[0], ends[-1]
        assert part.kl.value == pytest.approx(kl[:, first - 1 : last].mean(), rel=1e-3)
        assert part.share == pytest.approx((last - first + 1) / 40)
    for part, level in zip(found.percentiles, (0.5, 0.9, 0.99), strict=True):
        assert part.kl.value == pytest.approx(np.quantile(kl, level), rel=1e-3)
        assert part.kl.low <= part.kl.value <= part.kl.high


def test_a_slice_in_one_window_only_has_an_interval():
    kl = np.ones((3, 4))
    kl[0, 0] = 5.0
    sure = np.full((3, 4), 0.3)
    sure[0, 0] = 1.0
    measured = Divergence(kl, kl, kl, np.ones((3, 4), dtype=np.bool_), sure)
    first, last = text_depth(measured, None, Bootstrap(3, 200, 0)).by_confidence
    assert (first.name, last.name) == ("0.25–0.5", "0.9–1") and last.share == pytest.approx(1 / 12)
    assert [last.kl.value, last.kl.low, last.kl.high] == pytest.approx([5.0] * 3) and first.noise_floor_kl is None


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3_text", "phi"])
def test_layers_equal_their_definition(tiny_model, architecture):
    model = tiny_model(architecture)
    other = disturbed(model, only="weight")
    ids = torch.randint(3, 384, (2, 48))
    found = layer_errors(LogitStream(model, "a"), LogitStream(other, "b"), ids)
    assert len(found.blocks) == 2 and len(found.linears) >= 8

    def run(which, name, row):
        seen = []
        handle = which.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append((args, out)))
        with torch.no_grad():
            which(input_ids=row[None], use_cache=False)
        handle.remove()
        return seen[0]

    def errors(a, b):
        a, b = (x.reshape(-1, x.shape[-1]).double() for x in (a, b))
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
        return float(((b - a).norm(dim=-1) / a.norm(dim=-1)).mean()), float(cosine.mean())

    for w, row in enumerate(ids):
        for name, values in found.blocks.items():
            a, b = (run(which, name, row)[1] for which in (model, other))
            a, b = (x if isinstance(x, torch.Tensor) else x[0] for x in (a, b))
            assert values[w] == pytest.approx(errors(a, b), rel=1e-4) and values[w][0] > 1e-3
        for name, values in found.linears.items():
            args, output = run(model, name, row)
            with torch.no_grad():
                plain = errors(output, other.get_submodule(name)(*args))
            # taking factors back can only help, and by little: the disturbance hardly scales channels
            assert 0.8 * plain[0] < values[w][0] <= plain[0] * (1 + 1e-4)
            assert values[w][1] == pytest.approx(plain[1], rel=0.05)


def test_factors_that_folding_moved_are_no_errors(tiny_model):
    """The same function, with factors moved from norms, values and gates into the layers behind them."""
    model = tiny_model("llama", num_key_value_heads=4)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                factors = torch.rand_like(norm.weight) * 3 + 0.2
                norm.weight.div_(factors)
                for reader in readers:
                    reader.weight.mul_(factors)
            for writer, reader in ((attention.v_proj, attention.o_proj), (mlp.up_proj, mlp.down_proj)):
                factors = torch.rand(writer.out_features) * 3 + 0.2
                writer.weight.mul_(factors[:, None])
                reader.weight.div_(factors)
    ids = torch.randint(3, 384, (2, 48))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    found = layer_errors(LogitStream(model, "a"), LogitStream(other, "b"), ids)
    assert len(found.linears) == 14
    assert all(relative < 2e-3 for values in found.linears.values() for relative, _ in values)

    with torch.no_grad():  # one that is wrong besides is found, by as much as it is wrong
        weight = other.model.layers[1].mlp.down_proj.weight
        weight.add_(0.2 * weight.std(dim=0) * torch.randn_like(weight))
    found = layer_errors(LogitStream(model, "a"), LogitStream(other, "b"), ids)
    name = "model.layers.1.mlp.down_proj"
    assert all(0.15 < relative < 0.25 for relative, _ in found.linears.pop(name))
    assert all(relative < 2e-3 for values in found.linears.values() for relative, _ in values)


def test_only_changed_layers_are_named(tiny_model):
    model = tiny_model("llama")
    ids = torch.randint(3, 384, (2, 12))
    other = disturbed(model, only="layers.1.mlp.down_proj")
    found = layer_errors(LogitStream(model, "a"), LogitStream(other, "b"), ids)
    result = layer_result(found, None, "docs", ids, False, 50, 0)
    assert [layer.name for layer in result.linears] == ["model.layers.1.mlp.down_proj"]
    assert result.linears_compared == 14 and result.notes == ()
    assert [block.relative.value > 0 for block in result.blocks] == [False, True]
    assert result.blocks[0].cosine == pytest.approx(1)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_are_part_of_their_block(tiny_model, architecture):
    model = tiny_model(architecture)
    ids = torch.randint(3, 384, (2, 12))
    found = layer_errors(LogitStream(model, "a"), LogitStream(disturbed(model, only="experts"), "b"), ids)
    assert has_fused_experts(model)
    result = layer_result(found, None, "docs", ids, True, 50, 0)
    assert result.linears == () and result.linears_compared >= 8 and result.notes == (FUSED_NOTE,)
    assert all(block.relative.value > 0 for block in result.blocks)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_answers_are_those_of_generate(tiny_model, tiny_tokenizer, architecture, monkeypatch):
    monkeypatch.setattr(generation, "NEW_TOKENS", 12)
    monkeypatch.setattr(stream_module, "CHUNK_BYTES", 5 * 384 * 4)
    model = sharp(tiny_model(architecture))
    model.generation_config.eos_token_id = 2
    other = disturbed(model, 0.05)
    prompts = {name: ids[:, :40] for name, ids in prompt_ids(tiny_tokenizer).items()}
    given = answers(model, prompts, lambda: None)
    until = until_divergence(LogitStream(other, "b"), given, lambda: None)

    def generate(which, ids):
        return which.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)

    assert [answer.name for answer in given] == list(prompts)
    for answer, count in zip(given, until, strict=True):
        ids = prompts[answer.name]
        assert torch.equal(generate(model, ids), answer.ids)
        theirs, ours = generate(other, ids)[0, ids.shape[1] :].tolist(), answer.ids[0, ids.shape[1] :].tolist()
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        assert count == first
    assert any(count < answer.tokens for answer, count in zip(given, until, strict=True))
    assert until_divergence(LogitStream(model, "a"), given, lambda: None) == [answer.tokens for answer in given]


def test_long_windows_hold_a_chunk_of_logits_at_most(tiny_model, monkeypatch):
    monkeypatch.setattr(stream_module, "CHUNK_BYTES", 64 * 384 * 4)
    model = tiny_model("llama", max_position_embeddings=4096)
    largest = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: largest.append(output.shape[1]))
    ids = torch.randint(3, 384, (2, 4096))
    stream = LogitStream(model, "a")
    largest.clear()  # the probe of a few tokens
    found = text_depth(compare(run_reference(stream, ids), stream), None, Bootstrap(2, 20, 0))
    assert max(largest) == 64
    assert found.by_position[-1].name == "2048–4095"


def test_evaluate_records_depth(tiny_llama):
    options = {"windows": 2, "length": 24, "bootstrap_samples": 20, "progress": False, "speed": False}
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    result = evaluate(disturbed(model, only="_proj"), tiny_llama, **options)
    depth = result.depth
    assert depth is not None and depth.noise_floor_dtype == "bfloat16"
    assert len(depth.layers.linears) == 14 and len(depth.layers.blocks) == 2
    assert (depth.layers.windows, depth.layers.tokens, depth.layers.text) == (2, 24, "docs")
    assert all(0 < layer.noise_floor.value < layer.relative.value for layer in depth.layers.linears)
    assert depth.generation.chat_template and len(depth.generation.prompts) == len(generation.PROMPTS)
    assert all(prompt.noise_floor is not None for prompt in depth.generation.prompts)
    assert all(text.depth.by_position[0].noise_floor_kl is not None for text in result.texts)
    assert EvaluationResult.model_validate_json(result.model_dump_json()) == result

    without = evaluate(tiny_llama, tiny_llama, depth=False, noise_floor=False, **options)
    assert without.depth is None and without.texts[0].depth is None
    old = without.model_dump(mode="json")
    del old["depth"], old["texts"][0]["depth"]
    assert EvaluationResult.model_validate(old) == without
