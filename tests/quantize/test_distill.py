"""Tuning end to end: exact gradients, a lower loss on samples it never saw, and a model left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_quant.calibration.data import CalibrationData
from hf_quant.config import HfQuantConfig
from hf_quant.errors import CalibrationError
from hf_quant.grids import Scheme, decode
from hf_quant.integrations.shell import ModelWeights
from hf_quant.nn.swap import put_quantized, put_vectors
from hf_quant.plan import make_plan
from hf_quant.quantize.distill import ScaledLayer, _singles, distill
from hf_quant.quantize.objective import _Distance, _Divergence, find_objective
from hf_quant.quantize.weight import quantize_weight

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TUNING = {"steps": 16, "learning_rate": 3e-3, "batch": 2}


def build(kind: str = "llama", auto: type = AutoModelForCausalLM, **changes) -> nn.Module:
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes})).eval()


def data(samples: int = 16, length: int = 24, size: int = 4, seed: int = 0, vocabulary: int = 96) -> CalibrationData:
    """Text that follows a rule, so that a small model has something to say about it."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, vocabulary, (samples, length), generator=generator)
    for column in range(1, length):
        rows[:, column] = torch.where(
            rows[:, column] % 4 == 0, rows[:, column], 3 + (rows[:, column - 1] * 5) % (vocabulary - 3)
        )
    return CalibrationData.make([{"input_ids": part} for part in rows.split(size)], "self", seed)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A Llama that has learnt the rule of :func:`data`; read only."""
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for step in range(60):
        ids = data(16, seed=100 + step, size=16).batches[0]["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(input_ids=ids, labels=ids).loss < 3.2  # of log(96) = 4.6
    model.requires_grad_(False)
    return model


def tune(model: nn.Module, config: HfQuantConfig, samples: CalibrationData, tuning: dict, **options):
    plan = make_plan(model, config)
    weights = ModelWeights(model)
    scale_dtype = getattr(torch, plan.scale_dtype)
    tensors = {
        layer.name: quantize_weight(weights.weight(layer), layer.scheme, "absmax", scale_dtype=scale_dtype)
        for layer in plan.quantized
    }
    return tensors, distill(model, plan, samples, weights, tensors.__getitem__, tuning, **options)


def divergence(model: nn.Module, quantized: nn.Module, samples: CalibrationData) -> float:
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in samples.batches:
            wanted, found = (log_softmax(m(**batch).logits, -1).flatten(0, 1) for m in (model, quantized))
            total += float(kl_div(found, wanted, log_target=True, reduction="sum"))
            tokens += len(wanted)
    return total / tokens


def applied(model: nn.Module, tensors, found) -> nn.Module:
    result = copy.deepcopy(model)
    for name, tensor in {**tensors, **found[0]}.items():
        put_quantized(result, name, tensor, "reference")
    put_vectors(result, found[1])
    return result


# --- gradients ---


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("int", 4, True, 16),
        Scheme("int", 4, False, 16),
        Scheme("int", 8, False, -1),
        Scheme("int", 8, True, 32),
        Scheme("nf4", 4, True, 32),
    ],
    ids=lambda s: s.label,
)
def test_the_gradient_is_that_of_the_dequantized_weight(scheme: Scheme) -> None:
    torch.manual_seed(0)
    tensor = quantize_weight(torch.randn(24, 32) * 0.1, scheme, "absmax", scale_dtype=torch.float32)
    x = torch.randn(2, 5, 32, requires_grad=True)
    pull = torch.randn(2, 5, 24)
    layer = ScaledLayer(tensor, torch.device("cpu"))
    layer.factor.data += 0.1 * torch.randn_like(layer.factor)

    scale = tensor.scales().clone() * layer.factor.detach()
    unit = decode(tensor.codes(), torch.ones_like(scale), tensor.zero_point, scheme).view(24, -1, scheme.group(32))
    scale.requires_grad_(True)
    expected = x @ (unit * scale.unsqueeze(-1)).flatten(1).t()
    (expected * pull).sum().backward()
    expected_x, expected_factor = x.grad.clone(), scale.grad * tensor.scales()

    x.grad = None
    found = layer.forward(x)
    torch.testing.assert_close(found, expected)
    (found * pull).sum().backward()
    torch.testing.assert_close(x.grad, expected_x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.factor.grad, expected_factor, rtol=1e-4, atol=1e-5)


def test_a_factor_of_one_stores_the_very_same_tensor() -> None:
    for scheme in (Scheme("int", 4, False, 32), Scheme("nf4", 4, True, 64)):
        tensor = quantize_weight(torch.randn(16, 64), scheme)
        stored = ScaledLayer(tensor, torch.device("cpu")).stored()
        assert all(torch.equal(a, b) for a, b in zip(stored.tensors(), tensor.tensors(), strict=True))


@pytest.mark.parametrize("mask", [False, True])
def test_the_divergence_and_its_gradient_are_those_of_the_logits(trained: nn.Module, mask: bool) -> None:
    sample = dict(data(2, size=2).batches[0])
    if mask:
        sample["attention_mask"] = torch.ones_like(sample["input_ids"])
        sample["attention_mask"][1, 15:] = 0
    other = build(tie_word_embeddings=False)
    other.lm_head.weight.data = trained.lm_head.weight.data.clone()
    objective = find_objective(trained, set(), sample)
    assert isinstance(objective, _Divergence)
    objective.chunk = 7  # does not divide the tokens
    answer = objective.answer(sample)
    student = find_objective(other, set(), sample)
    student.chunk = 7
    keep = sample["attention_mask"].bool() if mask else torch.ones(2, 24, dtype=torch.bool)
    with torch.no_grad():
        wanted = log_softmax(trained(**sample).logits[keep], -1)
    expected = kl_div(log_softmax(other(**sample).logits[keep], -1), wanted, log_target=True, reduction="sum")
    expected = expected / keep.sum()
    vector = other.model.norm.weight
    (slope,) = torch.autograd.grad(expected, vector)
    assert student.loss(sample, answer) == pytest.approx(expected.item(), rel=1e-4)
    assert student.backward(sample, answer, 0.5) == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(vector.grad, 0.5 * slope, rtol=1e-3, atol=1e-6)
    assert "forward" not in vars(other.lm_head)


# --- what comes out ---


@pytest.mark.parametrize(
    "recipe",
    [{}, {"symmetric": False, "group_size": 64}, {"grid": "nf4", "double_quant": False}],
    ids=str,
)
def test_tuning_lowers_the_divergence_on_samples_it_never_saw(trained: nn.Module, recipe: dict) -> None:
    steps = []
    tensors, found = tune(trained, HfQuantConfig(method="absmax", **recipe), data(), TUNING, progress=steps.append)
    before, after = (divergence(trained, applied(trained, tensors, f), data(seed=7)) for f in (({}, {}), found))
    assert after < 0.8 * before
    assert set(found[0]) == set(tensors)
    assert {tensor.scale.dtype for tensor in found[0].values()} == {tensors[next(iter(tensors))].scale.dtype}
    assert all(torch.equal(found[0][name].packed, tensors[name].packed) for name in tensors)  # codes never change
    assert "model.norm.weight" in found[1]
    # what is reported is what comes out: the divergence on the last samples of the data, which were held out
    held_out = data().split(2)[1]
    assert steps[0].start == pytest.approx(divergence(trained, applied(trained, tensors, ({}, {})), held_out), rel=1e-3)
    best = min(step.held_out for step in steps)
    assert best == pytest.approx(divergence(trained, applied(trained, tensors, found), held_out), rel=1e-3)
    assert [step.step for step in steps] == list(range(1, len(steps) + 1)) and steps[0].steps == 16


def test_nested_scales_stay_and_the_vectors_are_tuned(trained: nn.Module) -> None:
    tensors, found = tune(trained, HfQuantConfig(grid="nf4", method="absmax"), data(), TUNING)
    assert found[0] == {}
    assert "model.norm.weight" in found[1]
    before, after = (divergence(trained, applied(trained, tensors, f), data(seed=7)) for f in (({}, {}), found))
    assert after < before


@pytest.mark.parametrize("rate", [10.0, float("nan")])
def test_what_ends_worse_than_it_began_is_not_kept(trained: nn.Module, rate: float) -> None:
    steps = []
    tuning = {"steps": 8, "learning_rate": rate, "batch": 1}
    _, found = tune(trained, HfQuantConfig(method="absmax"), data(8), tuning, progress=steps.append)
    assert found == ({}, {})
    assert len(steps) < 8  # and it was seen before the end


def test_the_best_moment_is_kept_not_the_last(trained: nn.Module) -> None:
    """A rate at which it first falls and then runs away."""
    steps = []
    tensors, found = tune(
        trained, HfQuantConfig(method="absmax"), data(), {**TUNING, "learning_rate": 0.05}, progress=steps.append
    )
    best = min(steps[0].start, *(step.held_out for step in steps))
    got = divergence(trained, applied(trained, tensors, found), data().split(2)[1])
    assert got == pytest.approx(best, rel=1e-3)


def test_deterministic(trained: nn.Module) -> None:
    config = HfQuantConfig(method="absmax")
    (_, first), (_, second) = (tune(trained, config, data(8), {**TUNING, "steps": 3}) for _ in range(2))
    assert first[0] and first[0].keys() == second[0].keys()
    assert all(torch.equal(first[0][name].scale, second[0][name].scale) for name in first[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(failing: bool) -> None:
    model = build()
    model.model.norm.weight.requires_grad_(False)
    wants = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    layer = model.model.layers[0].mlp.up_proj
    inner = layer.forward
    layer.forward = lambda x: inner(x)  # as accelerate does
    mine = layer.forward

    class Stop(Exception):
        pass

    def stop(step) -> None:
        if failing:
            raise Stop

    try:
        tune(model, HfQuantConfig(method="absmax"), data(8), {**TUNING, "steps": 2}, progress=stop)
    except Stop:
        assert failing
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wants
    assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert vars(layer).pop("forward") is mine
    assert not any("forward" in vars(module) for module in model.modules())


# --- other models ---


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 5.0, "tie_word_embeddings": False}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
    ],
)
def test_logits_that_are_changed_after_the_head_are_measured_before_it(kind: str, changes: dict) -> None:
    model = build(kind, **changes)
    sample = data(2, size=2).batches[0]
    objective = find_objective(model, set(), sample)
    assert isinstance(objective, _Distance)
    assert objective.answer(sample).shape == (48, 64)  # hidden states: logits of many samples are too large to keep


def test_a_head_that_is_quantized_is_not_taken_for_exact() -> None:
    model = build(tie_word_embeddings=False)
    config = HfQuantConfig(method="absmax", overrides={"lm_head": {"bits": 8, "group_size": 64}})
    sample = data(2, size=2).batches[0]
    assert isinstance(find_objective(model, set(), sample), _Divergence)
    assert isinstance(find_objective(model, {"lm_head"}, sample), _Distance)
    steps = []
    tensors, _ = tune(model, config, data(8), {**TUNING, "steps": 2}, progress=steps.append)
    assert "lm_head" in tensors and len(steps) == 2
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_is_tuned_on_its_hidden_states(padded: bool) -> None:
    model = build("bert", AutoModel)
    samples = data(8)
    if padded:
        masks = [torch.ones_like(batch["input_ids"]) for batch in samples.batches]
        for mask in masks:
            mask[1, 10:] = 0
        batches = [{**b, "attention_mask": m} for b, m in zip(samples.batches, masks, strict=True)]
        samples = CalibrationData.make(batches, "self", 0)
    steps = []
    tensors, found = tune(model, HfQuantConfig(method="absmax"), samples, {**TUNING, "steps": 8}, progress=steps.append)
    assert set(found[0]) == set(tensors)
    assert min(step.held_out for step in steps) < steps[0].start


def test_an_encoder_decoder_is_tuned_on_what_its_decoder_says() -> None:
    settings = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    model = build("t5", AutoModelForSeq2SeqLM, **settings)
    ids = data(8, 10, size=8).batches[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0  # of the encoder: has nothing to say about the decoder's tokens, of which there are as many
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1)}
    objective = find_objective(model, set(), batch)
    assert isinstance(objective, _Divergence)
    assert len(objective.answer(batch)) == ids.numel()
    steps = []
    samples = CalibrationData.make([batch], "self", 0)
    tune(model, HfQuantConfig(method="absmax"), samples, {**TUNING, "steps": 2}, progress=steps.append)
    assert len(steps) == 2 and steps[0].start > 0


def test_samples_that_cannot_be_told_apart_stay_together() -> None:
    batches = [{**batch, "patches": torch.ones(12, 2)} for batch in data(16).batches]  # 3 for each of 4 samples
    pieces = _singles(CalibrationData.make(batches, "images:x", 0))
    assert [(len(piece["input_ids"]), len(piece["patches"])) for piece in pieces] == [(4, 12)] * 4
    assert [len(piece["input_ids"]) for piece in _singles(data(6))] == [1] * 6


def test_one_sample_cannot_be_held_out_from_itself() -> None:
    with pytest.raises(CalibrationError, match="cannot be held out"):
        tune(build(), HfQuantConfig(method="absmax"), data(1, size=1), TUNING)
