"""Sensitivities: they predict the measured KL of single layers, leave the model alone, and are refused elsewhere."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel

from hf_quant.config import HfQuantConfig
from hf_quant.errors import SensitivityError
from hf_quant.grids import Scheme
from hf_quant.quantize.menu import make_menu
from hf_quant.quantize.sensitivity import estimate_sensitivity, settings
from hf_quant.quantize.sensitivity_record import Sensitivity, model_digest
from hf_quant.quantize.weight import quantize_weight

INT = HfQuantConfig()
G32 = Scheme(group_size=32)


@torch.no_grad()
def _measured(model, name, scheme, batches) -> float:
    """KL(float || with this layer alone quantized), nats per token, in float64."""
    model = model.double()
    weight = model.get_submodule(name).weight
    before = [model(**batch).logits.log_softmax(-1) for batch in batches]
    kept = weight.data.clone()
    weight.data.copy_(quantize_weight(kept.float(), scheme).dequantize())
    after = [model(**batch).logits.log_softmax(-1) for batch in batches]
    weight.data.copy_(kept)
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(before, after, strict=True))
    model.float()
    return total / sum(p.shape[0] * p.shape[1] for p in before)


@pytest.fixture(scope="module")
def peaked(tiny_model):
    """A tiny model with confident predictions: a random head gives all but the same distribution everywhere."""
    model = tiny_model("llama", tie_word_embeddings=False)
    model.lm_head.weight.data.mul_(20)
    return model


def test_it_predicts_the_measured_kl_of_single_layers(peaked, token_batches) -> None:
    menu = make_menu(peaked, INT)
    data = token_batches(32, 64)
    found = estimate_sensitivity(peaked, data, menu, samples=32, draws=4)
    predicted, measured = [], []
    for layer in menu.layers:
        for scheme in (G32, Scheme("int", 8, True, 64)):
            predicted.append(found.cost(layer.name, scheme.label))
            measured.append(_measured(peaked, layer.name, scheme, token_batches(32, 64, seed=1).batches))
    ratio = (torch.tensor(predicted) / torch.tensor(measured)).log()
    assert ratio.abs().max() < torch.tensor(2.5).log(), ratio.exp()
    assert ratio.mean().abs() < torch.tensor(1.3).log(), ratio.exp()


def test_a_sample_of_the_rows_stands_for_all(peaked, token_batches) -> None:
    menu = make_menu(peaked, INT)
    every = estimate_sensitivity(peaked, token_batches(), menu, rows=10**6)
    some = estimate_sensitivity(peaked, token_batches(), menu, rows=16)
    ratio = [some.cost(q.name, G32.label) / every.cost(q.name, G32.label) for q in menu.layers]
    assert min(ratio) > 0.5 and max(ratio) < 2
    assert ratio != [1.0] * len(ratio)


def test_it_is_deterministic_and_batches_do_not_matter(peaked, token_batches) -> None:
    menu = make_menu(peaked, INT)
    data = token_batches(4, size=2)
    single = data._replace(batches=tuple({"input_ids": row[None]} for b in data.batches for row in b["input_ids"]))
    first, again, apart = (estimate_sensitivity(peaked, d, menu) for d in (data, data, single))
    assert first == again == apart
    assert first != estimate_sensitivity(peaked, data, menu, seed=1)


def test_padding_counts_for_nothing(peaked, token_batches) -> None:
    menu = make_menu(peaked, INT)
    plain = token_batches(2)
    ids = plain.batches[0]["input_ids"]
    padded = {
        "input_ids": torch.cat([ids, torch.zeros_like(ids)], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1),
    }
    one = estimate_sensitivity(peaked, plain, menu)
    other = estimate_sensitivity(peaked, plain._replace(batches=(padded,)), menu)
    assert one.estimator == other.estimator
    for layer in menu.layers:
        assert other.cost(layer.name, G32.label) == pytest.approx(one.cost(layer.name, G32.label), rel=1e-3)


def test_the_model_is_left_as_it_was(tiny_model, token_batches) -> None:
    model = tiny_model("llama").train()
    model.model.norm.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    digest = model_digest(model)
    estimate_sensitivity(model, token_batches(), make_menu(model, INT))
    assert model.training and model.config.use_cache
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert model_digest(model) == digest


def test_other_architectures(tiny_model, token_batches) -> None:
    for architecture, config in (("gpt2", HfQuantConfig(grid="nf4")), ("opt", INT), ("gemma3_text", INT)):
        model = tiny_model(architecture)
        menu = make_menu(model, config)
        found = estimate_sensitivity(model, token_batches(), menu)
        assert all(layer.tokens for layer in found.layers.values())
        coarse, fine = (menu.layers[0].choices[i].label for i in (0, -2))
        assert found.cost(menu.layers[0].name, coarse) > found.cost(menu.layers[0].name, fine) > 0


def test_an_encoder_is_measured_by_its_output(token_batches) -> None:
    config = AutoConfig.for_model(
        "bert", vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    menu = make_menu(model, INT)
    assert menu.together[0][:2] == ("encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.key")
    found = estimate_sensitivity(model, token_batches(16), menu, samples=16, draws=4)
    assert found.estimator["loss"] == "projection"
    name = "encoder.layer.1.output.dense"
    batches = token_batches(16, seed=1).batches
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        before = torch.cat([model(**b).last_hidden_state for b in batches])
        weight.data.copy_(quantize_weight(weight, G32).dequantize())
        after = torch.cat([model(**b).last_hidden_state for b in batches])
    measured = 0.5 * float((after - before).square().mean() / before.var())
    assert found.cost(name, G32.label) == pytest.approx(measured, rel=0.5)


def test_experts_that_see_no_token_borrow(token_batches) -> None:
    class Routed(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config
            self.experts = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(2))
            self.head = torch.nn.Linear(64, 384)

        def forward(self, input_ids):
            hidden = self.inner(input_ids=input_ids).last_hidden_state
            return type("Output", (), {"logits": self.head(hidden + self.experts[0](hidden))})()

    config = AutoConfig.for_model(
        "llama", vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    model = Routed(AutoModel.from_config(config))
    menu = make_menu(model, INT)
    found = estimate_sensitivity(model, token_batches(), menu)
    assert found.layers["experts.1"].tokens == 0 < found.layers["experts.0"].tokens
    assert found.cost("experts.1", G32.label) > 0


def test_saved_and_read_again(peaked, token_batches, tmp_path) -> None:
    menu = make_menu(peaked, INT)
    data = token_batches()
    found = estimate_sensitivity(peaked, data, menu)
    found.save(tmp_path / "s.json")
    read = Sensitivity.load(tmp_path / "s.json")
    assert read == found
    read.check(model=model_digest(peaked), data=data.sha256, menu=menu, estimator=settings())


def test_refused_elsewhere(peaked, tiny_model, token_batches) -> None:
    menu = make_menu(peaked, INT, schemes=[G32])
    found = estimate_sensitivity(peaked, token_batches(), menu)
    other = tiny_model("llama", seed=1, tie_word_embeddings=False)
    with pytest.raises(SensitivityError, match="another model"):
        found.check(model=model_digest(other))
    with pytest.raises(SensitivityError, match="another calibration data"):
        found.check(data=token_batches(seed=5).sha256)
    with pytest.raises(SensitivityError, match="draws=1, not 2"):
        found.check(estimator=settings(draws=2))
    with pytest.raises(SensitivityError, match=r"q_proj have no scheme int4 sym g64 \(only int4 sym g32\)"):
        found.check(menu=make_menu(peaked, INT, schemes=[G32, Scheme(group_size=64)]))
    with pytest.raises(SensitivityError, match="no layer model"):
        found.check(menu=make_menu(tiny_model("llama", num_hidden_layers=3), INT, schemes=[G32]))
    with pytest.raises(SensitivityError, match=r"\(128, 64\), not \(256, 64\)"):
        found.check(menu=make_menu(tiny_model("llama", intermediate_size=256), INT, schemes=[G32]))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: d.update(schema_version=2), "schema_version"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: next(iter(d["layers"].values()))["costs"].update({"int4 sym g32": -1.0}), "is -1.0"),
        (lambda d: next(iter(d["layers"].values())).update(shape=[1]), "shape"),
    ],
)
def test_damaged_files(peaked, token_batches, tmp_path, damage, said) -> None:
    path = tmp_path / "s.json"
    estimate_sensitivity(peaked, token_batches(), make_menu(peaked, INT, schemes=[G32])).save(path)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(SensitivityError, match=said):
        Sensitivity.load(path)


def test_no_file_no_data_no_numbers(tiny_model, token_batches, tmp_path) -> None:
    with pytest.raises(SensitivityError, match="cannot be read"):
        Sensitivity.load(tmp_path / "none.json")
    model = tiny_model("llama")
    menu = make_menu(model, INT)
    with pytest.raises(SensitivityError, match="no calibration data"):
        estimate_sensitivity(model, token_batches()._replace(batches=()), menu)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(SensitivityError, match="NaN"):
        estimate_sensitivity(model, token_batches(), menu)
