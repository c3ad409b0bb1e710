"""LoRA on quantized layers: it trains, the packed base does not change, adapters travel, merging says what it costs."""

from __future__ import annotations

import copy
import importlib.metadata
import subprocess
import sys
import warnings
from pydoc_data import topics

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.model import LoraModel
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import peft as adapters

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.errors import ConfigError, DependencyError, WeightError
from hf_quant.integrations import peft as plugin
from hf_quant.integrations.peft import LoraQuantLinear, MergeWarning, merge_cost, merge_to_float
from hf_quant.nn.linear import QuantLinear
from hf_quant.nn.swap import quantized_modules

RECIPES = {
    "int4": {},
    "int4-asym": {"symmetric": False},
    "int8": {"bits": 8},
    "nf4": {"grid": "nf4"},
    "fp4": {"grid": "fp4"},
}
IDS = torch.randint(3, 384, (4, 24), generator=torch.Generator().manual_seed(0))
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _quantized(path, recipe="int4", **kwargs):
    config = HfQuantConfig(**RECIPES[recipe], method="absmax")
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, **kwargs)


def _lora(model, targets="all-linear", name="default", **settings) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(model, LoraConfig(**settings), adapter_name=name)


def _train(model, steps=20, lr=1e-2, autocast=False) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def _base_tensors(model) -> dict[str, torch.Tensor]:
    """Every stored tensor of every quantized layer, in the canonical packing."""
    found = {}
    for name, layer in quantized_modules(model):
        name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        found |= {f"{name}.{i}": tensor.clone() for i, tensor in enumerate(layer.quantized().tensors())}
    return found


def _assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def _nbytes(model) -> int:
    return sum(p.numel() * p.element_size() for _, layer in quantized_modules(model) for p in layer.parameters())


@pytest.fixture(scope="module")
def published(tiny_llama, tmp_path_factory):
    """``published(recipe)``: the directory of a saved checkpoint; read only."""
    made = {}

    def make(recipe="int4"):
        if recipe not in made:
            made[recipe] = tmp_path_factory.mktemp("published") / recipe
            _quantized(tiny_llama, recipe).save_pretrained(made[recipe])
        return made[recipe]

    return make


@pytest.fixture(scope="module")
def trained(published, tmp_path_factory):
    """The directory of an adapter trained on the published int4 checkpoint; read only."""
    path = tmp_path_factory.mktemp("adapter")
    model = _lora(AutoModelForCausalLM.from_pretrained(published()))
    _train(model)
    model.save_pretrained(path)
    return path


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["on load", "published"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_falls_and_the_base_stays_packed(recipe, origin, tiny_llama, published) -> None:
    on_load = origin == "on load"
    model = _quantized(tiny_llama, recipe) if on_load else AutoModelForCausalLM.from_pretrained(published(recipe))
    before, nbytes = _base_tensors(model), _nbytes(model)
    tuned = _lora(model)
    assert sum(isinstance(m, LoraQuantLinear) for m in tuned.modules()) == 14
    losses = _train(tuned)
    assert losses[-1] < losses[0] - 0.3, losses
    _assert_equal(_base_tensors(tuned), before)
    assert _nbytes(tuned) == nbytes
    trainable = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert trainable and all(".lora_A." in name or ".lora_B." in name for name in trainable)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_those_of_the_dequantized_model(recipe, tiny_llama) -> None:
    packed = _quantized(tiny_llama, recipe)
    plain = copy.deepcopy(packed)
    plain.dequantize()
    assert not list(quantized_modules(plain))
    models = [_lora(packed), _lora(plain)]
    generator = torch.Generator().manual_seed(1)
    values = {n: torch.randn(p.shape, generator=generator) * 0.05 for n, p in _adapter(models[0]).items()}
    gradients = []
    for model in models:
        with torch.no_grad():
            for name, parameter in _adapter(model).items():
                parameter.copy_(values[name])
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in _adapter(model).items()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=2e-4, atol=2e-6, msg=name)


def _adapter(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def test_training_keeps_no_float_weight(tiny_llama) -> None:
    # shapes that no activation, embedding or adapter has: only a float copy of a weight could
    model = _lora(_quantized(tiny_llama))
    shapes = {(layer.out_features, layer.in_features) for _, layer in quantized_modules(model)}
    shapes |= {(b, a) for a, b in shapes}
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tuple(tensor.shape) in shapes:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS).loss
    assert kept == []  # nothing waits for the backward pass
    loss.backward()
    sizes = {layer.out_features * layer.in_features for _, layer in quantized_modules(model)}
    held = [tensor for _, layer in quantized_modules(model) for tensor in _held(layer)]
    assert len(held) > 28
    assert not [t.shape for t in held if t.is_floating_point() and t.numel() in sizes]


def _held(layer: QuantLinear) -> list[torch.Tensor]:
    """Everything that a layer and its kernel hold."""
    assert layer._ready is not None
    return [*layer.parameters(), *layer.buffers(), *layer._ready.prepared.extras.values()]


class _Rows(Dataset):
    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": IDS[index], "labels": IDS[index]}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_trainer(checkpointing, published, tmp_path) -> None:
    base = AutoModelForCausalLM.from_pretrained(published())
    assert base.hf_quantizer.is_trainable
    if checkpointing:
        base.enable_input_require_grads()
    model = _lora(base)
    before = _base_tensors(model)
    settings = TrainingArguments(
        tmp_path,
        max_steps=25,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=checkpointing,
        disable_tqdm=True,
    )
    trainer = Trainer(model, settings, train_dataset=_Rows())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.3, losses
    _assert_equal(_base_tensors(model), before)
    trainer.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(published()), tmp_path / "adapter")
    assert torch.equal(_logits(again), _logits(model))


def test_trainer_refuses_a_quantized_model_without_an_adapter(published, tmp_path) -> None:
    with pytest.raises(ValueError, match="adapters"):
        Trainer(AutoModelForCausalLM.from_pretrained(published()), TrainingArguments(tmp_path, use_cpu=True))


def test_gradient_checkpointing_changes_no_gradient(published) -> None:
    found = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(published())
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        torch.manual_seed(3)
        tuned = _lora(model).train()
        with torch.no_grad():
            for parameter in _adapter(tuned).values():
                parameter.normal_(std=0.05)
        tuned(input_ids=IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in _adapter(tuned).items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("recipe", ["int4-asym", "nf4"])
def test_prepare_model_for_kbit_training(recipe, tiny_checkpoint) -> None:
    model = _quantized(tiny_checkpoint("llama", dtype=torch.bfloat16), recipe)
    before, nbytes = _base_tensors(model), _nbytes(model)
    model = prepare_model_for_kbit_training(model)
    assert model.is_gradient_checkpointing
    assert not hasattr(model, "is_loaded_in_4bit")
    assert not any(p.requires_grad for p in model.parameters())
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == torch.float32
    assert _nbytes(model) == nbytes
    tuned = _lora(model).train()
    losses = _train(tuned)
    assert losses[-1] < losses[0] - 0.3, losses
    _assert_equal(_base_tensors(tuned), before)


def test_a_float_model_is_prepared_as_peft_does(tiny_checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama", dtype=torch.bfloat16))
    model = prepare_model_for_kbit_training(model)
    assert not model.is_gradient_checkpointing
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("recipe", ["int4", "int8", "nf4"])
@pytest.mark.parametrize("how", ["bfloat16 model", "autocast"])
def test_bfloat16(how, recipe, tiny_checkpoint) -> None:
    dtype = torch.bfloat16 if how == "bfloat16 model" else torch.float32
    model = _lora(_quantized(tiny_checkpoint("llama", dtype=dtype), recipe, dtype=dtype))
    assert {p.dtype for p in _adapter(model).values()} == {torch.float32}
    losses = _train(model, autocast=how == "autocast")
    assert losses[-1] < losses[0] - 0.3, losses


def test_conv1d_and_biases(tiny_checkpoint) -> None:
    model = _lora(_quantized(tiny_checkpoint("gpt2"), "nf4"), ["c_attn", "c_fc"], fan_in_fan_out=True, lora_bias=True)
    losses = _train(model)
    assert losses[-1] < losses[0] - 0.2, losses
    reference = _logits(model)
    plain = merge_to_float(copy.deepcopy(model))
    torch.testing.assert_close(_logits(plain), reference, rtol=1e-4, atol=1e-5)
    with pytest.warns(MergeWarning):
        model.merge_adapter()
    merged = _logits(model)
    assert not torch.equal(merged, reference)
    model.unmerge_adapter()
    assert torch.equal(_logits(model), reference)


def test_a_trainable_bias_of_the_base_layer(tiny_checkpoint) -> None:
    model = _lora(_quantized(tiny_checkpoint("opt")), ["fc1"], bias="lora_only")
    biases = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("fc1.base_layer.bias")}
    assert biases
    _train(model, steps=3)
    assert all(not torch.equal(model.get_parameter(name), before) for name, before in biases.items())


# --- targets and registration ----------------------------------------------------------------------------------------


def test_targets(tiny_llama) -> None:
    def adapted(model) -> set[str]:
        found = (n for n, m in model.named_modules() if isinstance(m, plugin.tuners_utils.BaseTunerLayer))
        return {name.removeprefix("base_model.model.") for name in found}

    everything = {
        f"model.layers.{i}.{'mlp' if leaf in LAYERS[4:] else 'self_attn'}.{leaf}" for i in range(2) for leaf in LAYERS
    }
    assert adapted(_lora(_quantized(tiny_llama))) == everything
    assert adapted(_lora(_quantized(tiny_llama), ["q_proj"])) == {n for n in everything if n.endswith("q_proj")}
    assert adapted(_lora(_quantized(tiny_llama), r".*\.0\.mlp\..*_proj")) == {n for n in everything if ".0.mlp." in n}
    excluded = _lora(_quantized(tiny_llama), exclude_modules=["down_proj"])
    assert adapted(excluded) == {n for n in everything if not n.endswith("down_proj")}
    # layers that stayed in float get peft's own LoRA
    config = HfQuantConfig(overrides={"q_proj": "float"}, method="absmax")
    mixed = _lora(AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config))
    assert adapted(mixed) == everything
    assert sum(isinstance(m, LoraQuantLinear) for m in mixed.modules()) == 12


def test_heads_are_left_out_also_when_they_are_quantized(tiny_llama) -> None:
    model = _quantized(tiny_llama)
    model.lm_head = QuantLinear.from_quantized(model.model.layers[0].mlp.up_proj.quantized())
    assert isinstance(_lora(model).base_model.model.lm_head, QuantLinear)


def test_sequence_classification(tiny_llama) -> None:
    config = HfQuantConfig(method="absmax", overrides={"score": "float"})
    base = AutoModelForSequenceClassification.from_pretrained(tiny_llama)
    model = _lora(hf_quant.quantize(base, config), task_type="SEQ_CLS")
    model(input_ids=IDS, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert model.base_model.model.score.modules_to_save["default"].weight.grad is not None
    assert sum(isinstance(m, LoraQuantLinear) for m in model.modules()) == 14


@pytest.mark.parametrize(
    "imports",
    [
        """
import hf_quant.api, sys
assert "transformers" in sys.modules and "peft" not in sys.modules
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
""",
        "from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training\nimport hf_quant",
    ],
    ids=["hf_quant first", "peft first"],
)
def test_registration_in_either_order_of_imports(imports, published) -> None:
    code = f"""
{imports}
from transformers import AutoModelForCausalLM
model = prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained({str(published())!r}))
assert model.is_gradient_checkpointing
model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
assert type(model.base_model.model.model.layers[0].mlp.up_proj).__name__ == "LoraQuantLinear"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_peft_that_has_changed_is_left_alone(monkeypatch, caplog) -> None:
    create = LoraModel._create_new_module
    plugin.register()  # a second call does nothing
    assert LoraModel._create_new_module is create
    monkeypatch.delattr(LoraModel, "hf_quant_registered")
    monkeypatch.delattr(plugin.peft_other, "prepare_model_for_kbit_training")
    with caplog.at_level("WARNING", logger="hf_quant"):
        plugin.register()
    assert "no peft.utils.other.prepare_model_for_kbit_training" in caplog.text
    assert LoraModel._create_new_module is create


def test_an_old_peft_is_named(monkeypatch, published) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.1")
    with pytest.raises(DependencyError, match=r"peft 0.17.1.*0\.21"):
        _lora(AutoModelForCausalLM.from_pretrained(published()))


@pytest.mark.parametrize(
    ("settings", "offender"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "orthogonal"}, "orthogonal"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "q_proj.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_needs_a_float_weight_is_refused(settings, offender, published) -> None:
    with pytest.raises(ConfigError, match=offender):
        _lora(AutoModelForCausalLM.from_pretrained(published()), **settings)


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"lora_dropout": 0.1}, {"init_lora_weights": "gaussian"}])
def test_what_does_not_is_not(settings, published) -> None:
    model = _lora(AutoModelForCausalLM.from_pretrained(published()), **settings).train()
    losses = _train(model)
    assert losses[-1] < losses[0] - 0.3, losses


# --- adapters that travel --------------------------------------------------------------------------------------------


def test_an_adapter_comes_back(trained, published) -> None:
    first = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(published()), trained)
    lazily = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(published()), trained, low_cpu_mem_usage=True
    )
    reference = _logits(first)
    assert torch.equal(_logits(lazily), reference)
    with first.disable_adapter():
        bare = _logits(AutoModelForCausalLM.from_pretrained(published()))  # one that may run fused: equal to rounding
        torch.testing.assert_close(_logits(first), bare, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(reference, _logits(first.unload()), atol=1e-2)


def test_an_adapter_goes_on_training(trained, published) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(published()), trained, is_trainable=True)
    start = model(input_ids=IDS, labels=IDS).loss.item()
    assert _train(model, steps=10)[-1] < start


@pytest.mark.skipif(
    Version(peft.__version__) < Version(getattr(adapters, "MIN_PEFT_VERSION", "0")),
    reason="this transformers asks for a newer peft than the one that is installed",
)
def test_transformers_own_adapter_methods(trained, published) -> None:
    reference = _logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(published()), trained))
    model = AutoModelForCausalLM.from_pretrained(published())
    model.load_adapter(str(trained))
    assert torch.equal(_logits(model), reference)
    fresh = AutoModelForCausalLM.from_pretrained(published())
    fresh.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
    losses = _train(fresh)
    assert losses[-1] < losses[0] - 0.2, losses


def test_several_adapters(trained, published) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(published()), trained, adapter_name="one")
    one = _logits(model)
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("two")
    _train(model, steps=10)
    two = _logits(model)
    model.set_adapter("one")
    assert torch.equal(_logits(model), one)
    assert not torch.allclose(one, two, atol=1e-2)
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["one", "two", "__base__", "two"]).logits
    torch.testing.assert_close(mixed[0], one[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[[1, 3]], two[[1, 3]], rtol=1e-4, atol=1e-5)
    model.add_weighted_adapter(["one"], [1.0], "three", combination_type="linear")
    model.set_adapter("three")
    torch.testing.assert_close(_logits(model), one, rtol=1e-4, atol=1e-5)


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_merging_says_what_it_costs_and_can_be_undone(recipe, tiny_llama) -> None:
    model = _lora(_quantized(tiny_llama, recipe))
    _train(model, lr=3e-3)
    before, reference = _base_tensors(model), _logits(model)
    foreseen = merge_cost(model)
    _assert_equal(_base_tensors(model), before)
    with pytest.warns(MergeWarning) as caught:
        model.merge_adapter()
    assert len(caught) == 1
    assert f"{foreseen.mean_error:.2%} on average and {foreseen.max_error:.2%} at most" in str(caught[0].message)
    assert caught[0].filename == __file__
    report = merge_cost(model)
    assert report == foreseen and len(report.layers) == 14
    limit = 0.02 if recipe == "int8" else 0.13
    assert 0 < report.mean_error <= report.max_error < limit
    assert report.mean_kept == pytest.approx(1, abs=0.1)
    # the cost is that of the tensors as they are
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    expected = layer.original_weight() + layer.delta(["default"])
    error = (layer.quant_layer.dequantize() - expected).norm() / expected.norm()
    cost = next(c for c in report.layers if c.name == "model.layers.1.mlp.up_proj")
    assert cost.error == pytest.approx(error.item(), rel=1e-4) and cost.label == layer.quant_layer.scheme.label
    merged = _logits(model)
    base = (_logits_without(model) - reference).norm()  # disabling the adapter unmerges it
    assert (merged - reference).norm() < (0.2 if recipe == "int8" else 0.9) * base
    _assert_equal(_base_tensors(model), before)
    assert torch.equal(_logits(model), reference)


def _logits_without(model) -> torch.Tensor:
    with model.disable_adapter():
        return _logits(model)


def test_a_merged_model_is_an_ordinary_checkpoint(trained, published, tmp_path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(published()), trained)
    with pytest.warns(MergeWarning, match=r"14 layers re-quantized to int4 sym g32: .* hold \d+% of the adapter"):
        merged = model.merge_and_unload()
    assert not any(isinstance(m, LoraQuantLinear) for m in merged.modules())
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(_logits(again), _logits(merged))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size == (published() / "model.safetensors").stat().st_size
    # the same adapter merges into the same codes
    other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(published()), trained)
    with pytest.warns(MergeWarning):
        _assert_equal(_base_tensors(other.merge_and_unload()), _base_tensors(merged))


def test_an_adapter_that_did_nothing_changes_nothing(published) -> None:
    model = _lora(AutoModelForCausalLM.from_pretrained(published()))
    before = _base_tensors(model)
    report = merge_cost(model)
    assert report.max_error == 0 and report.mean_kept == 1
    with pytest.warns(MergeWarning, match=r"0\.00% on average"):
        _assert_equal(_base_tensors(model.merge_and_unload()), before)


def test_merging_several_adapters_rounds_once(trained, published) -> None:
    def make():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(published()), trained, adapter_name="a")
        torch.manual_seed(1)
        model.add_adapter("b", LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
        return model

    at_once, in_turn = make(), make()
    before = _base_tensors(in_turn)
    with pytest.warns(MergeWarning):
        at_once.merge_adapter(["a", "b"])
    with pytest.warns(MergeWarning):
        in_turn.merge_adapter(["a"])
    with pytest.warns(MergeWarning):
        in_turn.merge_adapter(["b"])
    _assert_equal(_base_tensors(in_turn), _base_tensors(at_once))
    assert in_turn.base_model.model.model.layers[0].mlp.up_proj.merged_adapters == ["a", "b"]
    in_turn.unmerge_adapter()
    _assert_equal(_base_tensors(in_turn), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        in_turn.unmerge_adapter()


def test_merging_to_float_loses_nothing(trained, published, tmp_path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(published()), trained)
    reference = _logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MergeWarning)
        plain = merge_to_float(model)
    assert not list(quantized_modules(plain))
    torch.testing.assert_close(_logits(plain), reference, rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(_logits(again), _logits(plain))


def test_a_damaged_adapter_is_not_merged(published) -> None:
    model = _lora(AutoModelForCausalLM.from_pretrained(published()))
    before = _base_tensors(model)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(WeightError, match=r"layers\.0\.self_attn\.q_proj: .* NaN"):
        model.merge_adapter()
    _assert_equal(_base_tensors(model), before)


def test_what_cannot_be_merged_or_measured(published) -> None:
    base = AutoModelForCausalLM.from_pretrained(published())
    with pytest.raises(ConfigError, match="no quantized layer"):
        merge_cost(base)
    with pytest.raises(ConfigError, match="not a PeftModel"):
        merge_to_float(base)
    model = _lora(base, lora_bias=True)
    with pytest.raises(ConfigError, match="adapter nobody"):
        merge_cost(model, ["nobody"])
    with pytest.raises(ConfigError, match=r"q_proj has no bias"):
        model.merge_adapter()


# --- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_model_learns_a_text_and_keeps_it_when_merged(smollm2_float) -> None:
    tokens = AutoTokenizer.from_pretrained(smollm2_float)(topics.topics["class"])["input_ids"][:128]
    ids = torch.tensor(tokens).view(2, 64)
    config = HfQuantConfig(method="absmax")
    model = AutoModelForCausalLM.from_pretrained(smollm2_float, quantization_config=config, dtype=torch.float32)
    before = _base_tensors(model)
    tuned = _lora(model, r=8, lora_alpha=16)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(5):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, losses
    _assert_equal(_base_tensors(tuned), before)
    with torch.no_grad():
        adapted = tuned(input_ids=ids, labels=ids).loss.item()
        with pytest.warns(MergeWarning):
            merged = tuned.merge_and_unload()
        after = merged(input_ids=ids, labels=ids).loss.item()
    assert after - adapted < 0.5 * (losses[0] - adapted), (losses, adapted, after)
