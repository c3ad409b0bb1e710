"""Accuracy budgets: kept by what is measured, with few bits and few tries, and refused clearly."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import hf_quant
from hf_quant.config import HfQuantConfig
from hf_quant.errors import BudgetError
from hf_quant.quantize.allocate import Budget, allocate
from hf_quant.quantize.fit_budget import Measurement, fit_budget
from hf_quant.quantize.menu import make_menu
from hf_quant.quantize.sensitivity import estimate_sensitivity
from hf_quant.quantize.sensitivity_record import LayerSensitivity, Sensitivity

INT = HfQuantConfig()


def _budget(**kwargs) -> Budget:
    budget = Budget.parse(**kwargs)
    assert budget is not None
    return budget


@pytest.fixture(scope="module")
def menu(tiny_model):
    return make_menu(tiny_model("llama", num_hidden_layers=8), INT)


@pytest.fixture(scope="module")
def sensitivity(menu):
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for layer in menu.layers:
        scale = 0.02 * float(torch.rand((), generator=generator)) ** 2
        costs = {c.label: scale * 4 ** (4 - c.bits / layer.numel) for c in layer.choices if c.scheme}
        layers[layer.name] = LayerSensitivity(layer.shape, 1, costs)
    return Sensitivity("m", "d", {}, layers)


def _world(sensitivity, power: float, factor: float):
    """A model whose loss is a power of what the sensitivities add up to."""

    def measure(overrides) -> Measurement:
        total = 0.0
        for name, value in overrides.items():
            if value != "float":
                group = "per-channel" if value["group_size"] == -1 else f"g{value['group_size']}"
                total += sensitivity.cost(name, f"int{value['bits']} sym {group}")
        return Measurement(factor * total**power, 0.5 * factor * total**power)

    return measure


@pytest.mark.parametrize("power", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("factor", [0.1, 0.9, 4.0])
@pytest.mark.parametrize("asked", [{"max_kl": 0.02}, {"max_ppl_increase": "1%"}])
def test_the_measured_loss_keeps_the_budget_with_few_bits(menu, sensitivity, power, factor, asked) -> None:
    budget = _budget(**asked)
    fitted = fit_budget(menu, sensitivity, budget, _world(sensitivity, power, factor))
    assert fitted.measured is not None and len(fitted.attempts) <= 4
    value = fitted.measured.kl if budget.kind == "max_kl" else fitted.measured.loss_increase
    assert value <= budget.limit
    everything_cheapest = fitted.allocation.bits_per_weight == pytest.approx(4.2222, abs=1e-3)
    assert value >= 0.8 * budget.limit or everything_cheapest
    assert fitted.allocation.predicted_kl == pytest.approx(value)
    assert fitted.best_attempt is not None and fitted.attempts[fitted.best_attempt].fits


def test_budgets_of_bits_are_not_measured(menu, sensitivity) -> None:
    def measure(overrides):
        raise AssertionError("measured")

    fitted = fit_budget(menu, sensitivity, _budget(target_bits=5), measure, factor=0.3)
    plain = allocate(menu, sensitivity, _budget(target_bits=5))
    assert fitted.allocation.choices == plain.choices and fitted.measured is None and fitted.best_attempt is None
    assert fitted.allocation.predicted_kl == pytest.approx(0.3 * plain.predicted_kl)


def test_a_perplexity_that_falls_ends_at_the_fewest_bits(menu, sensitivity) -> None:
    fitted = fit_budget(
        menu, sensitivity, _budget(max_ppl_increase="0.1%"), lambda overrides: Measurement(0.01, -0.002), tries=6
    )
    cheapest = min(p.bits_per_weight for p in fitted.allocation.curve)
    assert fitted.allocation.bits_per_weight == pytest.approx(cheapest)


def test_a_budget_that_no_try_keeps(menu, sensitivity) -> None:
    said = []
    with pytest.raises(BudgetError, match=r"not reached in 2 tries: the closest lost 0\.5"):
        fit_budget(
            menu,
            sensitivity,
            _budget(max_kl=0.02),
            lambda overrides: Measurement(0.5 + 0.01 * len(said)),
            tries=2,
            progress=said.append,
        )
    assert [attempt.fits for attempt in said] == [False, False]
    with pytest.raises(BudgetError, match="loss is nan"):
        fit_budget(menu, sensitivity, _budget(max_kl=0.02), lambda overrides: Measurement(math.nan))


def test_with_a_model(tiny_model, token_batches) -> None:
    """Sensitivities, allocation, quantization and KL on other data, all real."""
    model = tiny_model("llama", tie_word_embeddings=False)
    model.lm_head.weight.data.mul_(20)
    menu = make_menu(model, INT)
    held_out = torch.cat([batch["input_ids"] for batch in token_batches(8, 48, seed=7).batches])
    with torch.no_grad():
        reference = model(held_out).logits.log_softmax(-1)

    def measure(overrides) -> Measurement:
        config = HfQuantConfig(overrides=overrides)
        with torch.no_grad():
            found = hf_quant.quantize(copy.deepcopy(model), config)(held_out).logits.log_softmax(-1)
        return Measurement(float((reference.exp() * (reference - found)).sum(-1).mean()))

    sensitivity = estimate_sensitivity(model, token_batches(8, 48), menu)
    coarse = measure(allocate(menu, sensitivity, _budget(target_bits=4.3)).overrides).kl
    limit = coarse / 4
    fitted = fit_budget(menu, sensitivity, _budget(max_kl=limit), measure)
    assert fitted.measured is not None
    assert fitted.measured.kl <= limit
    assert 4.3 < fitted.allocation.bits_per_weight < 8.5
    assert 0.4 < fitted.factor < 2.5
