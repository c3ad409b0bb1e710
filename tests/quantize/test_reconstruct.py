"""Blocks tuned alone: closer to the float model's blocks on batches that decide, never further, and nothing left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_quant.calibration.data import CalibrationData
from hf_quant.config import HfQuantConfig
from hf_quant.errors import CalibrationError
from hf_quant.integrations.shell import ModelWeights
from hf_quant.plan import make_plan
from hf_quant.quantize import reconstruct as module
from hf_quant.quantize.reconstruct import Reconstruction, reconstruct
from hf_quant.quantize.weight import quantize_weight
from hf_quant.tensor import QuantizedTensor

STEPS = 12


class Run:
    """A model with quantized layers whose scales are off by up to a few percent, and what became of them."""

    def __init__(self, model: nn.Module, off: float = 0.03, **recipe) -> None:
        self.model, self.plan = model, make_plan(model, HfQuantConfig(**{"method": "absmax", **recipe}))
        self.weights = ModelWeights(model)
        generator = torch.Generator().manual_seed(0)
        self.start: dict[str, QuantizedTensor] = {}
        for layer in self.plan.quantized:
            dtype = getattr(torch, self.plan.scale_dtype)
            tensor = quantize_weight(self.weights.weight(layer), layer.scheme, "absmax", scale_dtype=dtype)
            if tensor.scale is not None:
                factor = 1 + off * torch.randn(tensor.scale.shape, generator=generator)
                tensor = replace(tensor, scale=(tensor.scale.float() * factor).to(tensor.scale.dtype))
            self.start[layer.name] = tensor
        self.now = dict(self.start)
        self.changed: dict[str, dict[str, QuantizedTensor]] = {}
        self.reports: list[Reconstruction] = []

    def go(self, batches: list[dict[str, torch.Tensor]], steps: int = STEPS, done: set[str] = frozenset()) -> Run:
        def keep(block: str, tensors: dict[str, QuantizedTensor]) -> None:
            assert block not in self.changed
            self.changed[block] = dict(tensors)
            self.now |= tensors

        data = CalibrationData.make(batches, "numbers", 0)
        options = (self.model, self.plan, data, self.weights, lambda name: self.now[name], keep)
        reconstruct(*options, done.__contains__, steps, progress=self.reports.append)
        return self


def same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "whisper", "vit", "gemma2"])
def test_blocks_come_closer_to_the_float_model(name: str, model_of, batches_of, error_of, monkeypatch) -> None:
    monkeypatch.setattr(module, "RATE", 5e-3)  # few steps, and scales that are far off
    run = Run(model_of(name), off=0.1).go(batches_of(name), steps=24)
    assert [report.done for report in run.reports] == list(range(1, len(run.changed) + 1))
    assert {report.total for report in run.reports} == {len(run.changed)}
    assert all(0 < report.after <= report.before for report in run.reports)
    assert sum(report.after < 0.97 * report.before for report in run.reports) > len(run.reports) / 2
    fresh = batches_of(name, count=4, seed=99)
    assert error_of(run.model, run.now, fresh) < error_of(run.model, run.start, fresh)


def test_only_scales_change_and_they_stay_what_can_be_stored(model_of, batches_of) -> None:
    for recipe in ({}, {"symmetric": False}, {"grid": "nf4", "double_quant": False}):
        run = Run(model_of(), **recipe).go(batches_of(count=4), steps=4)
        assert any(run.changed.values())
        for name, tensor in run.now.items():
            before = run.start[name]
            assert tensor.scale.dtype == before.scale.dtype and tensor.scheme == before.scheme
            assert torch.equal(tensor.packed, before.packed)
            zeros = (tensor.zero_point, before.zero_point)
            assert zeros == (None, None) or torch.equal(*zeros)


def test_what_gets_worse_on_the_held_out_batches_is_not_kept(model_of, batches_of, monkeypatch) -> None:
    monkeypatch.setattr(module, "RATE", 3.0)
    run = Run(model_of()).go(batches_of())
    assert run.changed == {"model.layers.0": {}, "model.layers.1": {}}
    assert all(report.after == report.before for report in run.reports)


def test_what_is_reported_is_what_comes_out(model_of, batches_of) -> None:
    """The error of the first block on the last of eight batches, which is held out."""
    model, batches = model_of(), batches_of()
    run = Run(model).go(batches)
    inputs, block = [], model.model.layers[0]
    hook = block.register_forward_hook(
        lambda m, args, kwargs, out: inputs.append((args, kwargs, out)), with_kwargs=True
    )
    with torch.no_grad():
        model(**batches[-1], use_cache=False)
        hook.remove()
        args, kwargs, exact = inputs[0]
        for tensors, expected in ((run.start, run.reports[0].before), (run.now, run.reports[0].after)):
            other = model_of()
            for name, tensor in tensors.items():
                other.get_parameter(f"{name}.weight").copy_(tensor.dequantize())
            found = other.model.layers[0](*args, **kwargs)
            ratio = (found - exact).square().mean(-1) / exact.square().mean(-1)
            assert float(ratio.mean()) == pytest.approx(expected, rel=1e-3)


def test_nested_scales_are_not_touched(model_of, batches_of) -> None:
    overrides = {"re:.*down_proj": {"double_quant": False}}
    for recipe, changing in (({"grid": "nf4"}, set()), ({"grid": "nf4", "overrides": overrides}, {"down_proj"})):
        run = Run(model_of(), **recipe)
        assert any(tensor.nested is not None for tensor in run.start.values())
        run.go(batches_of(count=4), steps=4)
        assert len(run.changed) == 2 and len(run.reports) == 2
        names = {name for tensors in run.changed.values() for name in tensors}
        assert {name.rpartition(".")[2] for name in names} == changing
        assert all(same(run.now[name], run.start[name]) for name in run.start.keys() - names)


def test_resumed_it_ends_the_same(model_of, batches_of) -> None:
    batches = batches_of(count=4)
    whole = Run(model_of()).go(batches, steps=6)
    half = Run(model_of())
    half.now |= whole.changed["model.layers.0"]
    half.go(batches, steps=6, done={"model.layers.0"})
    assert list(half.changed) == ["model.layers.1"]
    assert all(same(half.now[name], tensor) for name, tensor in whole.now.items())
    nothing = Run(model_of()).go(batches, steps=6, done={"model.layers.0", "model.layers.1"})
    assert not nothing.changed and not nothing.reports


def test_deterministic(model_of, batches_of) -> None:
    first, second = (Run(model_of()).go(batches_of(count=4), steps=4) for _ in range(2))
    assert first.changed["model.layers.0"]
    assert all(same(first.now[name], tensor) for name, tensor in second.now.items())


def test_padding_says_nothing(model_of, batches_of) -> None:
    model = model_of()
    rows = [batch["input_ids"] for batch in batches_of(count=4)]
    reports = []
    for filler in (5, 77):
        batches = []
        for ids in rows:
            mask = torch.ones_like(ids)
            mask[1, 7:] = 0
            batches.append({"input_ids": torch.where(mask > 0, ids, filler), "attention_mask": mask})
        reports.append(Run(model).go(batches, steps=4).reports)
    for one, other in zip(*reports, strict=True):
        assert (one.before, one.after) == pytest.approx((other.before, other.after), rel=1e-4)


def test_one_batch_is_cut_so_that_something_is_held_out(model_of, batches_of) -> None:
    (batch,) = batches_of(count=1, size=8)
    one = Run(model_of()).go([batch], steps=4)
    two = Run(model_of()).go([{"input_ids": batch["input_ids"][:7]}, {"input_ids": batch["input_ids"][7:]}], steps=4)
    assert one.changed["model.layers.0"]
    assert all(same(one.now[name], tensor) for name, tensor in two.now.items())
    single = Run(model_of()).go([{"input_ids": batch["input_ids"][:1]}], steps=4)
    assert len(single.reports) == 2 and all(report.after <= report.before for report in single.reports)


def test_layers_outside_of_blocks_stay(model_of, batches_of) -> None:
    model = model_of(tie_word_embeddings=False)
    run = Run(model, overrides={"lm_head": {"bits": 8, "group_size": 64}}).go(batches_of(count=4), steps=4)
    assert "lm_head" in run.start and same(run.now["lm_head"], run.start["lm_head"])
    assert any(run.changed.values())
    # before the blocks: OPT projects its embeddings
    model = model_of("opt", word_embed_proj_dim=32)
    run = Run(model).go(batches_of("opt", count=4), steps=4)
    outside = {name for name in run.start if "layers" not in name}
    assert outside == {"model.decoder.project_in", "model.decoder.project_out"}
    assert any(run.changed.values()) and all(same(run.now[name], run.start[name]) for name in outside)


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(failing: bool, model_of, batches_of) -> None:
    model = model_of("t5")
    assert all(parameter.requires_grad for parameter in model.parameters())
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    caching = [part.config.use_cache for part in model.modules() if hasattr(part, "config")]
    inner = model.encoder.block[0].forward
    model.encoder.block[0].forward = lambda *args, **kwargs: inner(*args, **kwargs)  # as accelerate does
    mine = model.encoder.block[0].forward
    run = Run(model)
    batches = batches_of("t5", count=3)
    if failing:
        batches[-1] = {**batches[-1], "decoder_input_ids": torch.full((2, 4), 9999)}
        with pytest.raises(CalibrationError, match="does not run on the calibration data"):
            run.go(batches, steps=2)
    else:
        run.go(batches, steps=2)
        assert len(run.changed) == 4
    assert vars(model.encoder.block[0]).pop("forward") is mine
    assert not any("forward" in vars(part) for part in model.modules())
    assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert [part.config.use_cache for part in model.modules() if hasattr(part, "config")] == caching


# --- blocks of other kinds ---


class _Block(nn.Module):
    """Gives a tuple, or a name for what it gives; its second layer may never be asked."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, hidden: torch.Tensor):
        if self.kind == "idle":
            return hidden * 2
        out = hidden + torch.tanh(self.first(hidden))
        if self.kind != "half":
            out = out + self.second(out)
        return {"tuple": (out, "more"), "dict": {"out": out}}.get(self.kind, out)


class _Model(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, kind: str) -> None:
        super().__init__(PretrainedConfig())
        self.embed = nn.Embedding(128, 64)
        self.layers = nn.ModuleList(_Block(kind) for _ in range(2))
        self.head = nn.Linear(64, 128)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
            hidden = hidden["out"] if isinstance(hidden, dict) else hidden[0] if isinstance(hidden, tuple) else hidden
        return self.head(hidden)


@pytest.mark.parametrize("kind", ["plain", "tuple", "half", "idle", "dict"])
def test_what_blocks_may_give(kind: str, batches_of) -> None:
    torch.manual_seed(0)
    run = Run(_Model(kind).eval()).go(batches_of(), steps=STEPS)
    assert list(run.changed) == ([] if kind == "dict" else ["layers.0", "layers.1"])
    if kind == "dict":  # no tensor to aim at
        assert not run.reports
    elif kind == "idle":
        assert [report.after for report in run.reports] == [0.0, 0.0] and not any(run.changed.values())
    else:
        assert all(report.after < report.before for report in run.reports)
        unused = [name for name in run.start if kind == "half" and name.endswith("second")]
        assert all(same(run.now[name], run.start[name]) for name in unused)
