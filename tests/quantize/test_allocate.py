"""Budgets: what can be asked for, what is allocated, that its bits are the plan's, and that stock runtimes load it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import hf_quant
from hf_quant.config import HfQuantConfig
from hf_quant.errors import BudgetError, SensitivityError
from hf_quant.evaluation.size import disk_bytes
from hf_quant.grids import Scheme
from hf_quant.plan import make_plan
from hf_quant.quantize.allocate import Allocation, Budget, allocate
from hf_quant.quantize.menu import default_schemes, make_menu
from hf_quant.quantize.sensitivity import estimate_sensitivity
from hf_quant.quantize.sensitivity_record import LayerSensitivity, Sensitivity
from hf_quant.skeleton import plan_directory

INT = HfQuantConfig()
NF4 = HfQuantConfig(grid="nf4")
Q0, UP1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def _budget(**kwargs) -> Budget:
    budget = Budget.parse(**kwargs)
    assert budget is not None
    return budget


def _invented(menu, seed: int = 0) -> Sensitivity:
    """Costs that fall with the bits and differ between layers."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer in menu.layers:
        scale = float(torch.rand((), generator=generator)) ** 3
        costs = {c.label: scale * 4 ** (4 - c.bits / layer.numel) for c in layer.choices if c.scheme}
        layers[layer.name] = LayerSensitivity(layer.shape, 1, costs)
    return Sensitivity("m", "d", {}, layers)


@pytest.mark.parametrize(
    ("asked", "kind", "limit"),
    [
        ({"target_bits": 4.25}, "target_bits", 4.25),
        ({"target_bits": "5.5"}, "target_bits", 5.5),
        ({"max_size": "900MB"}, "max_size", 900e6),
        ({"max_size": "1.2GB"}, "max_size", 1.2e9),
        ({"max_size": "700 MiB"}, "max_size", 700 * 2**20),
        ({"max_size": "1_000kb"}, "max_size", 1e6),
        ({"max_size": 123456}, "max_size", 123456),
        ({"max_kl": "0.05"}, "max_kl", 0.05),
        ({"max_ppl_increase": "1%"}, "max_ppl_increase", math.log(1.01)),
        ({"max_ppl_increase": 0.02}, "max_ppl_increase", math.log(1.02)),
    ],
)
def test_budgets_that_can_be_read(asked, kind, limit) -> None:
    budget = _budget(**asked)
    assert (budget.kind, budget.limit) == (kind, pytest.approx(limit))
    assert json.loads(json.dumps(budget.record()))["kind"] == kind


@pytest.mark.parametrize(
    "asked",
    [
        {"target_bits": 0},
        {"target_bits": "four"},
        {"max_size": "12 parsecs"},
        {"max_size": "-5MB"},
        {"max_size": "IB"},
        {"max_kl": "nan"},
        {"max_kl": "inf"},
        {"max_ppl_increase": "-3%"},
        {"max_ppl_increase": "-200%"},
        {"target_bits": 4, "max_kl": 0.1},
    ],
)
def test_budgets_that_cannot(asked) -> None:
    with pytest.raises(BudgetError, match=next(iter(asked))):
        Budget.parse(**asked)
    assert Budget.parse() is None


@pytest.mark.parametrize("config", [INT, NF4, HfQuantConfig(scale_dtype="float32")], ids=["int", "nf4", "f32 scales"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.8])
def test_bits_and_bytes_are_the_plan_s(tiny_model, config, share) -> None:
    model = tiny_model("llama")
    menu = make_menu(model, config)
    cheapest = allocate(menu, _invented(menu), _budget(max_kl=1e9)).bits_per_weight
    allocation = allocate(menu, _invented(menu), _budget(target_bits=cheapest + share * (16 - cheapest)))
    plan = make_plan(model, allocation.apply(config))
    assert {q.name: q.scheme for q in plan.layers if q.name in allocation.choices} == allocation.choices
    assert allocation.quantized_bits_per_weight == pytest.approx(plan.bits_per_weight, rel=1e-12)
    sizes = {layer.name: layer.numel for layer in menu.layers}
    kept = sum(sizes[name] for name, scheme in allocation.choices.items() if scheme is None)
    average = (plan.bits_per_weight * (menu.numel - kept) + 16 * kept) / menu.numel
    assert allocation.bits_per_weight == pytest.approx(average, rel=1e-12)
    assert allocation.bits_per_weight <= cheapest + share * (16 - cheapest) + 1e-9
    headers = allocation.nbytes - plan.planned_bytes
    assert 0 < headers < 200 * 6 * len(plan.layers) + 200


def test_bits_are_those_of_the_directory_s_plan(tiny_model, tiny_llama) -> None:
    menu = make_menu(tiny_model("llama"), INT)
    allocation = allocate(menu, _invented(menu), _budget(target_bits=5.5))
    plan = plan_directory(tiny_llama, allocation.apply(INT))
    assert plan.bits_per_weight == pytest.approx(allocation.quantized_bits_per_weight, rel=1e-12)


def test_layers_that_runtimes_fuse_share_a_scheme(tiny_model) -> None:
    model = tiny_model("llama")
    menu = make_menu(model, INT)
    for seed in range(4):
        for target in (4.3, 5.0, 7.0, 12.0):
            chosen = allocate(menu, _invented(menu, seed), _budget(target_bits=target)).choices
            for block in ("model.layers.0", "model.layers.1"):
                assert len({chosen[f"{block}.self_attn.{x}_proj"] for x in "qkv"}) == 1
                assert len({chosen[f"{block}.mlp.{x}_proj"] for x in ("gate", "up")}) == 1
    loose = make_menu(model, INT, together=())
    assert len(loose.together) == len(loose.layers) == 14
    assert len(menu.together) == 8
    target = _budget(target_bits=5.0)
    assert allocate(loose, _invented(menu), target).predicted_kl <= allocate(menu, _invented(menu), target).predicted_kl


def test_the_user_s_own_requests_stand(tiny_model) -> None:
    config = HfQuantConfig(overrides={Q0: {"bits": 8, "group_size": 32}, "o_proj": "float"}, skip=[UP1])
    menu = make_menu(tiny_model("llama"), config)
    names = {layer.name for layer in menu.layers}
    assert UP1 not in names and not any("o_proj" in name for name in names)
    allocation = allocate(menu, _invented(menu), _budget(target_bits=4.8))
    assert allocation.choices[Q0] == Scheme("int", 8, True, 32)
    assert {UP1, "model.layers.0.self_attn.o_proj"}.isdisjoint(allocation.overrides)
    plan = make_plan(tiny_model("llama"), allocation.apply(config))
    assert plan.scheme_of(Q0) == Scheme("int", 8, True, 32)
    assert plan.scheme_of("model.layers.0.self_attn.o_proj") is None
    assert plan.bits_per_weight == pytest.approx(allocation.quantized_bits_per_weight, rel=1e-12)


def test_groups_that_do_not_divide_are_offered_as_the_plan_fits_them(tiny_model) -> None:
    menu = make_menu(tiny_model("llama", hidden_size=96, num_attention_heads=4, head_dim=24), INT)
    labels = [choice.label for choice in menu.layer(Q0).choices]
    assert labels == ["int4 sym per-channel", "int4 sym g32", "int8 sym per-channel", "int8 sym g32", "float"]


def test_each_format_offers_what_it_holds(tiny_model) -> None:
    labels = {c.label for layer in make_menu(tiny_model("llama"), NF4).layers for c in layer.choices}
    assert labels == {"nf4 g32 dq", "nf4 g64 dq", "nf4 g128 dq", "float"}
    assert {s.bits for s in default_schemes(INT) if s} == {4, 8}
    with pytest.raises(BudgetError, match="zero points"):
        make_menu(tiny_model("llama"), HfQuantConfig(symmetric=False))
    with pytest.raises(BudgetError, match="no scheme to choose from"):
        make_menu(tiny_model("llama"), INT, schemes=[None])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"target_bits": 3}, r"cheapest schemes need, 4\.2222 bits"),
        ({"max_size": "1kB"}, r"smallest checkpoint, 2\d\d,\d{3} bytes, of which 199,"),
        ({"target_bits": 16}, "every layer in float"),
        ({"max_size": "1GB"}, "holds the whole float model"),
        ({"max_kl": 1e-12}, "every layer in float"),
    ],
)
def test_impossible_budgets_say_what_is_possible(tiny_model, asked, said) -> None:
    menu = make_menu(tiny_model("llama"), INT)
    with pytest.raises(BudgetError, match=said):
        allocate(menu, _invented(menu), _budget(**asked))


def test_an_accuracy_that_no_scheme_reaches(tiny_model) -> None:
    menu = make_menu(tiny_model("llama"), INT, schemes=[Scheme(group_size=64), Scheme(group_size=32)])
    with pytest.raises(BudgetError, match="less than the most accurate allocation is predicted to lose"):
        allocate(menu, _invented(menu), _budget(max_kl=1e-9))


def test_more_bytes_never_predict_more_loss(tiny_model) -> None:
    menu = make_menu(tiny_model("llama"), INT)
    allocation = allocate(menu, _invented(menu), _budget(target_bits=5))
    bits = [p.bits_per_weight for p in allocation.curve]
    loss = [p.predicted_kl for p in allocation.curve]
    assert len(allocation.curve) <= 64 and bits == sorted(bits) and loss == sorted(loss, reverse=True)
    at_most = [p.predicted_kl for p in allocation.curve if p.bits_per_weight <= 5]
    assert allocation.predicted_kl <= min(at_most)
    scaled = allocate(menu, _invented(menu), _budget(max_kl=0.5 * allocation.predicted_kl), factor=0.5)
    assert scaled.bits_per_weight <= allocation.bits_per_weight
    assert scaled.predicted_kl == pytest.approx(0.5 * allocation.predicted_kl)


def test_the_checkpoint_is_within_its_size(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    menu = make_menu(model, INT)
    limit = 252_000
    allocation = allocate(menu, _invented(menu), _budget(max_size=limit))
    hf_quant.quantize(model, allocation.apply(INT), tmp_path / "out")
    written = disk_bytes(tmp_path / "out")
    assert limit * 0.95 < written <= allocation.nbytes <= limit


def test_sensitivities_of_another_model_are_refused(tiny_model) -> None:
    menu = make_menu(tiny_model("llama"), INT)
    other = _invented(make_menu(tiny_model("llama"), INT, schemes=[Scheme(group_size=64)]))
    with pytest.raises(SensitivityError, match="no scheme int4 sym g32"):
        allocate(menu, other, _budget(target_bits=5))


CHILD = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
logits = model(torch.arange(3, 27).view(2, 12)).logits
assert "hf_quant" not in sys.modules
save_file({"logits": logits.detach().float().contiguous()}, sys.argv[2])
"""


def test_a_mixed_checkpoint_loads_in_stock_transformers(tiny_model, token_batches, tmp_path) -> None:
    """From sensitivities to a file: int4 and int8 in several groups and float layers, read without our plugin."""
    model = tiny_model("llama")
    menu = make_menu(model, INT)
    sensitivity = estimate_sensitivity(model, token_batches(), menu)
    allocation: Allocation = allocate(menu, sensitivity, _budget(target_bits=7.0))
    kinds = {(s.bits if s else 16) for s in allocation.choices.values()}
    assert {4, 8} <= kinds, allocation.counts()
    quantized = hf_quant.quantize(model, allocation.apply(INT), tmp_path / "out")
    with torch.no_grad():
        ours = quantized(torch.arange(3, 27).view(2, 12)).logits.float()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "out"), str(tmp_path / "logits.safetensors")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    stock = load_file(tmp_path / "logits.safetensors")["logits"]
    assert float((stock - ours).abs().max() / ours.abs().max()) < 1e-4
