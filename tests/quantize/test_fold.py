"""Folds on many kinds of models: where they are found, that nothing changes, and what the factors are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_quant.config import HfQuantConfig
from hf_quant.errors import CalibrationError
from hf_quant.integrations.shell import ModelWeights
from hf_quant.plan import PlannedLayer, make_plan
from hf_quant.quantize.fold import LARGEST, FoldedWeights, Folds, balanced, find_folds
from hf_quant.quantize.fold_sites import Site, find_sites

ATTENTION = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
}
LLAMA = {
    **ATTENTION,
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
GEMMA = {
    **ATTENTION,
    "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
# what stands before the names of a block -> its places
SITES: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "llama": {"model.layers.": LLAMA},
    "mistral": {"model.layers.": LLAMA},
    "qwen2": {"model.layers.": LLAMA},
    "qwen3": {"model.layers.": LLAMA},
    "gemma2": {"model.layers.": GEMMA},
    "gemma3_text": {"model.layers.": GEMMA},
    # a router that stays in float reads the other norm
    "mixtral": {"model.layers.": ATTENTION | {f"mlp.experts.{i}.w3": (f"mlp.experts.{i}.w2",) for i in range(4)}},
    "qwen3_moe": {
        "model.layers.": ATTENTION | {f"mlp.experts.{i}.up_proj": (f"mlp.experts.{i}.down_proj",) for i in range(4)},
    },
    "gpt2": {"transformer.h.": {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)}},
    "opt": {
        "model.decoder.layers.": {
            "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn.v_proj": ("self_attn.out_proj",),
            "final_layer_norm": ("fc1",),
            "fc1": ("fc2",),  # what is between them is a relu
        }
    },
    "gpt_neox": {
        "gpt_neox.layers.": {
            "input_layernorm": ("attention.query_key_value",),
            "post_attention_layernorm": ("mlp.dense_h_to_4h",),
        }
    },
    # one norm before attention and MLP
    "phi": {
        "model.layers.": {
            "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
            "self_attn.v_proj": ("self_attn.dense",),
        }
    },
    "phi3": {
        "model.layers.": {
            "input_layernorm": ("self_attn.qkv_proj",),
            "post_attention_layernorm": ("mlp.gate_up_proj",),
        }
    },
    "t5": {
        "encoder.block.": {
            "layer.0.layer_norm": ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
            "layer.0.SelfAttention.v": ("layer.0.SelfAttention.o",),
            "layer.1.layer_norm": ("layer.1.DenseReluDense.wi",),
        },
        "decoder.block.": {
            "layer.0.layer_norm": ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
            "layer.0.SelfAttention.v": ("layer.0.SelfAttention.o",),
            "layer.1.layer_norm": ("layer.1.EncDecAttention.q",),
            "layer.1.EncDecAttention.v": ("layer.1.EncDecAttention.o",),
            "layer.2.layer_norm": ("layer.2.DenseReluDense.wi",),
        },
    },
    "whisper": {
        "model.encoder.layers.": {
            "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn.v_proj": ("self_attn.out_proj",),
            "final_layer_norm": ("fc1",),
        },
        "model.decoder.layers.": {
            "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn.v_proj": ("self_attn.out_proj",),
            "encoder_attn_layer_norm": ("encoder_attn.q_proj",),
            "encoder_attn.v_proj": ("encoder_attn.out_proj",),
            "final_layer_norm": ("fc1",),
        },
    },
    "vit": {
        "layers.": {
            "layernorm_before": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            "attention.v_proj": ("attention.o_proj",),
            "layernorm_after": ("mlp.fc1",),
        }
    },
    # their norms come after the addition: what they give goes on in the residual stream
    "bert": {},
    "albert": {
        "encoder.albert_layer_groups.": {"albert_layers.0.attention.value": ("albert_layers.0.attention.dense",)}
    },
}


def uneven(model: PreTrainedModel) -> PreTrainedModel:
    """Norms and biases that say something, and columns of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        elif parameter.dim() == 2:
            parameter.data.mul_(torch.exp(0.7 * torch.randn(parameter.shape[1], generator=generator)))
    return model


@pytest.fixture
def build(model_of) -> Callable[..., PreTrainedModel]:
    return lambda name="llama", **changes: uneven(model_of(name, **changes))


def planned(model: nn.Module, **settings) -> tuple[PlannedLayer, ...]:
    return make_plan(model, HfQuantConfig(method="gptq", **settings)).quantized


def sites_of(model: nn.Module, sample: dict[str, torch.Tensor], **settings) -> list[Site]:
    return find_sites(model, planned(model, **settings), ModelWeights(model), sample)


def folds_of(model: nn.Module, samples: list[dict[str, torch.Tensor]], **settings) -> Folds:
    return find_folds(model, planned(model, **settings), ModelWeights(model), samples)


def folded(model: nn.Module, folds: Folds) -> nn.Module:
    """A copy with the weights through apply and the norms through in_place."""
    result = copy.deepcopy(model)
    weights = FoldedWeights(ModelWeights(result), folds)
    for layer in planned(model):
        weight = weights.weight(layer)
        parameter = result.get_parameter(f"{layer.name}.weight")
        parameter.data = weight.t().contiguous() if layer.kind == "Conv1D" else weight
    with folds.in_place(result):
        for name in folds.floats:
            parameter = result.get_parameter(name)
            kept = parameter.data.clone()
            parameter.data = kept
        values = {name: result.get_parameter(name).data.clone() for name in folds.floats}
    for name, value in values.items():
        result.get_parameter(name).data = value
    return result


def caching(model: nn.Module) -> list[bool]:
    configs = (module.config for module in model.modules() if hasattr(module, "config"))
    return [config.use_cache for config in configs if hasattr(config, "use_cache")]


def change(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


# --- where, and that nothing changes ---


@pytest.mark.parametrize("name", SITES)
def test_every_place_is_found_and_the_outputs_stay(name: str, build, batches_of, output_of) -> None:
    model = build(name)
    before, cached = {key: value.clone() for key, value in model.state_dict().items()}, caching(model)
    sample, fresh = batches_of(name, count=1)[0], batches_of(name, count=1, seed=9)[0]
    found = sites_of(model, sample)
    blocks: dict[str, dict[str, tuple[str, ...]]] = {}
    for site in found:
        prefix = next(key for key in SITES[name] if site.producer.startswith(key))
        block = prefix + site.producer.removeprefix(prefix).partition(".")[0] + "."
        short = tuple(consumer.removeprefix(block) for consumer in site.consumers)
        blocks.setdefault(block, {})[site.producer.removeprefix(block)] = short
    for prefix, expected in SITES[name].items():
        mine = {block: places for block, places in blocks.items() if block.startswith(prefix)}
        assert mine and all(places == expected for places in mine.values()), mine
    assert {block.rstrip(".").rpartition(".")[0] + "." for block in blocks} == set(SITES[name])
    assert all(site.plus_one == ("gemma" in name) for site in found if site.norm)

    folds = folds_of(model, [sample])
    assert set(folds.columns) == {consumer for site in found for consumer in site.consumers}
    assert set(folds.rows) == {site.producer for site in found if not site.norm}
    exact = output_of(model, fresh)
    assert change(output_of(folded(model, folds), fresh), exact) < 2e-5
    if found:
        with folds.in_place(model):
            assert len(folds) and change(output_of(model, fresh), exact) > 1e-3  # the factors are no ones
    into = copy.deepcopy(model)
    folds.into(into, planned(model))
    assert change(output_of(into, fresh), exact) < 2e-5
    # the model is as it was
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert caching(model) == cached


@pytest.mark.parametrize("failing", [False, True])
def test_in_place_puts_everything_back(failing: bool, build, batches_of) -> None:
    model = build("qwen2")
    folds = folds_of(model, batches_of(count=1))
    assert any(name.endswith("v_proj.bias") for name in folds.floats)
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    values = {name: data.clone() for name, data in before.items()}
    try:
        with folds.in_place(model):
            for name, parameter in model.named_parameters():
                wanted = folds.floats.get(name, values[name])
                assert torch.equal(parameter.data, wanted)
            if failing:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert failing
    assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())
    assert all(parameter.data_ptr() == before[name].data_ptr() for name, parameter in model.named_parameters())


def test_a_layer_that_stays_in_float_takes_its_norm_out(build, batches_of) -> None:
    model = build()
    found = sites_of(model, batches_of(count=1)[0], overrides={"re:.*(q|up)_proj": "float"})
    assert {site.producer.rpartition(".")[2] for site in found} == {"v_proj"}


def test_padding_in_the_sample(build, batches_of, output_of) -> None:
    model = build()
    batch = batches_of(count=1)[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[1, :9] = 0
    plain, padded = sites_of(model, batch), sites_of(model, {**batch, "attention_mask": mask})
    assert [site.producer for site in plain] == [site.producer for site in padded]
    assert len(plain) == 8


def test_deterministic(build, batches_of) -> None:
    samples = batches_of(count=6, size=1, length=40)
    first, second = (folds_of(build("qwen2"), samples) for _ in range(2))
    for one, other in ((first.columns, second.columns), (first.rows, second.rows), (first.floats, second.floats)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_data_that_does_not_fit_is_named(build) -> None:
    with pytest.raises(CalibrationError, match="LlamaForCausalLM does not run on the calibration data"):
        folds_of(build(), [{"input_ids": torch.full((1, 8), 9999)}])


# --- what a trial of the first block does not show ---


class _Block(nn.Module):
    """v and o around a mean over tokens; the values may come from the block before."""

    def __init__(self, limit: float | None = None, borrow: bool = False, sometimes: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.v, self.o = nn.Linear(64, 64), nn.Linear(64, 64)
        self.limit, self.borrow = limit, borrow
        if sometimes:
            self.other = nn.Linear(64, 64)

    def forward(self, hidden: torch.Tensor, shared: list[torch.Tensor], asked: bool) -> torch.Tensor:
        normed = self.norm(hidden)
        value = self.v(normed)
        if self.limit is not None:
            value = value.clamp(-self.limit, self.limit)
        shared.append(value)
        value = (shared[0] if self.borrow else value).cumsum(1) / 8
        if asked:
            hidden = hidden + self.other(normed)
        return hidden + self.o(value)


class _Model(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, blocks: list[_Block]) -> None:
        super().__init__(PretrainedConfig())
        self.embed = nn.Embedding(128, 64)
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(64, 128)

    def forward(self, input_ids: torch.Tensor, asked: torch.Tensor | None = None) -> torch.Tensor:
        hidden, shared = self.embed(input_ids), []
        for layer in self.layers:
            hidden = layer(hidden, shared, asked is not None)
        return self.head(hidden)


def _sites(*settings: dict) -> set[str]:
    """Producers that are found in a model of such blocks."""
    torch.manual_seed(0)
    model = uneven(_Model([_Block(**each) for each in settings]).eval())
    return {site.producer for site in sites_of(model, {"input_ids": torch.arange(3, 35).view(2, 16)})}


def test_without_any_trap() -> None:
    assert _sites({}, {}) == {"layers.0.norm", "layers.1.norm", "layers.0.v", "layers.1.v"}


def test_values_that_a_later_block_borrows_stay() -> None:
    """Each block by itself would allow it: but the later one's columns know nothing of the first one's factors."""
    assert _sites({}, {"borrow": True}) == {"layers.0.norm", "layers.1.norm"}


def test_values_that_are_clamped_stay_even_if_the_sample_is_quiet() -> None:
    assert _sites({"limit": 100.0}, {"limit": 100.0}) == {"layers.0.norm", "layers.1.norm"}


def test_a_norm_that_a_layer_reads_only_sometimes_stays() -> None:
    """The sample does not ask for that layer, which would read a norm that was divided behind its back."""
    assert _sites({"sometimes": True}, {"sometimes": True}) == {"layers.0.v", "layers.1.v"}


# --- the factors ---


def pooled(weights: list[torch.Tensor], channel: torch.Tensor) -> torch.Tensor:
    """Sizes of channels over all layers that read them, each layer counting the same."""
    found = torch.zeros(int(channel.max()) + 1)
    for weight in weights:
        size = torch.zeros_like(found).index_add_(0, channel, weight.square().mean(0))
        found += size / size.mean()
    return found.sqrt()


def test_columns_become_equally_large() -> None:
    torch.manual_seed(0)
    size = torch.exp(0.5 * torch.randn(256))
    factors = balanced(size)
    assert float((size * factors).std() / (size * factors).mean()) < 1e-5
    assert float(factors.log().mean()) == pytest.approx(0, abs=1e-5)
    half = balanced(size, 0.5)
    torch.testing.assert_close(half, factors.sqrt())
    assert torch.equal(balanced(size, 0.0), torch.ones(256))


def test_columns_of_a_model_become_more_alike(build, batches_of) -> None:
    model = build("qwen3")
    sample = batches_of(count=1)[0]
    folds, layers = folds_of(model, [sample]), {layer.name: layer for layer in planned(model)}
    weights = ModelWeights(model)
    for site in sites_of(model, sample):
        plain = [weights.weight(layers[name]) for name in site.consumers]
        after = [weight * folds.columns[name] for name, weight in zip(site.consumers, plain, strict=True)]
        spread = [float(pooled(these, site.channel).log().std()) for these in (plain, after)]
        assert spread[1] < 0.6 * spread[0], site.producer


def test_factors_are_bounded_and_what_is_zero_or_no_number_is_left_alone() -> None:
    size = torch.tensor([1e-30, 1.0, 1e30, 0.0, 2.0])
    factors = balanced(size)
    assert factors[3] == 1.0
    assert float(factors.min()) >= 1 / LARGEST and float(factors.max()) <= LARGEST
    for odd in (torch.zeros(3), torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")])):
        assert torch.equal(balanced(odd), torch.ones(len(odd)))


def test_norms_are_exact_in_bfloat16(build, batches_of) -> None:
    for name in ("llama", "gemma2", "opt"):
        model = build(name)
        folds = folds_of(model, batches_of(name, count=1))
        norms = {key: value for key, value in folds.floats.items() if "norm" in key and key.endswith(".weight")}
        assert len(norms) == 4
        for key, value in norms.items():
            changed = value != model.get_parameter(key)
            assert changed.float().mean() > 0.9
            assert torch.equal(value[changed], value[changed].to(torch.bfloat16).to(torch.float32))


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_zeros_are_harmless(name: str, build, batches_of, output_of) -> None:
    model = build(name)
    for key, parameter in model.named_parameters():
        if "layers" in key and "norm" in key and key.endswith("weight"):
            parameter.data[:5] = -1.0 if name == "gemma2" else 0.0  # the norm gives zeros
            parameter.data[5] = 1e-42
        elif "layers" in key and parameter.dim() == 2:
            parameter.data[:, 8:12] = 0
            parameter.data[3] = 0
    sample, fresh = batches_of(name, count=1)[0], batches_of(name, count=1, seed=9)[0]
    folds = folds_of(model, [sample])
    assert len(folds) >= 8
    for values in (folds.columns, folds.rows, folds.floats):
        assert all(torch.isfinite(value).all() for value in values.values())
    assert change(output_of(folded(model, folds), fresh), output_of(model, fresh)) < 2e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "layers.0.input_layernorm"])
def test_what_is_not_finite_is_left_to_the_quantizer(value: float, where: str, build, batches_of) -> None:
    model = build()
    model.get_parameter(f"model.{where}.weight").data.view(-1)[3] = value
    folds = folds_of(model, batches_of(count=1))
    weight = folds.apply(f"model.{where}", model.get_parameter("model.layers.1.mlp.up_proj.weight"))
    assert weight.shape == (128, 64)


# --- what is decided by data ---


def test_the_power_of_every_place_is_decided_by_what_its_layers_read(build, batches_of) -> None:
    samples, model = batches_of(count=6, size=1, length=48), build()
    undecided, decided = folds_of(model, samples[:1]), folds_of(model, samples)  # one sample cannot be held out
    powers = []
    for site in sites_of(model, samples[0]):
        name = site.consumers[0]
        if name in decided.columns:
            ratio = decided.columns[name].log().norm() / undecided.columns[name].log().norm()
            powers.append(0.5 * float(ratio))
        else:
            powers.append(0.0)  # and nothing is left behind of it
            assert not {f"{site.producer}.weight", *site.consumers} & (decided.floats.keys() | decided.rows.keys())
    assert all(min(abs(power - allowed) for allowed in (0.0, 0.5, 1.0)) < 0.1 for power in powers)
    assert any(power > 0.4 for power in powers)
