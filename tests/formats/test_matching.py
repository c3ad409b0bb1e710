"""Name lists: compact patterns match what they were made from and nothing else."""

from __future__ import annotations

import random

import pytest

from hf_quant.errors import FormatError
from hf_quant.formats import FORMATS, format_for, format_of
from hf_quant.formats.matching import compact, is_skipped, matches, skip_keys

LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.up_proj.bias")
MODEL = [f"model.layers.{i}.{leaf}" for i in range(12) for leaf in LEAVES] + ["lm_head", "model.embed_tokens"]
EXPERTS = [f"layers.{i}.experts.{j}.w1" for i in range(3) for j in range(4)]


def _matched(targets: list[str], universe: list[str]) -> set[str]:
    return {name for name in universe if any(matches(target, name) for target in targets)}


def test_all_layers_become_one_pattern() -> None:
    wanted = [name for name in MODEL if name.endswith("q_proj")]
    assert compact([*wanted, "lm_head"], MODEL) == [r"re:^model\.layers\.\d+\.self_attn\.q_proj$", "lm_head"]


def test_some_layers_become_an_alternation() -> None:
    wanted = [f"model.layers.{i}.mlp.up_proj" for i in (0, 1, 11)]
    assert compact(wanted, MODEL) == [r"re:^model\.layers\.(0|1|11)\.mlp\.up_proj$"]


def test_two_numbers_fall_back_to_names() -> None:
    assert compact(EXPERTS, EXPERTS) == [r"re:^layers\.\d+\.experts\.\d+\.w1$"]
    assert compact(EXPERTS[:5], EXPERTS) == EXPERTS[:5]


def test_odd_names_stay_exact() -> None:
    universe = ["a.01.fc", "a.1.fc", "a.2.fc", "a+b.0.fc", "aab.0.fc", "a+b.1.fc"]
    assert _matched(compact(["a.1.fc", "a.2.fc"], universe), universe) == {"a.1.fc", "a.2.fc"}
    assert _matched(compact(["a.01.fc", "a.2.fc"], universe), universe) == {"a.01.fc", "a.2.fc"}
    assert _matched(compact(["a+b.0.fc", "a+b.1.fc"], universe), universe) == {"a+b.0.fc", "a+b.1.fc"}


def test_any_subset_is_matched_exactly() -> None:
    draw = random.Random(0)
    for _ in range(100):
        universe = MODEL + EXPERTS
        wanted = draw.sample(universe, draw.randint(0, len(universe)))
        targets = compact(wanted, universe)
        assert _matched(targets, universe) == set(wanted)
        assert len(targets) <= len(wanted)


def test_skip_keys_skip_exactly() -> None:
    names = [f"model.decoder.layers.{i}.{leaf}" for i in range(12) for leaf in ("fc1", "fc2", "fc1.lora")] + [
        "fc1",
        "head",
    ]
    draw = random.Random(1)
    for _ in range(50):
        floats = draw.sample(names, draw.randint(0, 8))
        # a module inside a skipped module is skipped too: transformers' rule, and ours to respect
        quantized = [n for n in names if n not in floats and not any(n.startswith(f + ".") for f in floats)]
        keys = skip_keys(floats, quantized)
        assert all(is_skipped(name, keys) for name in floats)
        assert not any(is_skipped(name, keys) for name in quantized)
    assert skip_keys(["head"], names[:-1]) == ["head"]
    assert skip_keys(["fc1"], names[:-2]) == ["^fc1$"]
    assert is_skipped("a(b", skip_keys(["a(b"], names))


def test_skip_rule_is_transformers_own(stock_as_known) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    keys = ["lm_head", "fc1", "layers.1", r"layers.\d+.mlp", "^fc2$", "mlp.gate", "head"]
    names = [
        *("lm_head", "model.lm_head", "lm_head2", "fc1", "a.fc1", "fc1.b", "fc2", "a.fc2", "layers.1.x", "layers.11.x"),
        *("layers.10.mlp.up", "mlp.gate", "mlp.gate_proj", "x.mlp.gate", "ahead", "header"),
    ]
    for name in names:
        for key in keys:
            assert is_skipped(name, [key]) != should_convert_module(name, [key]), (name, key)
        assert is_skipped(name, keys) != should_convert_module(name, keys)
        assert not is_skipped(name, [])


def test_broken_patterns_are_named() -> None:
    with pytest.raises(FormatError, match=r"target 're:\(' is not a regular expression"):
        matches("re:(", "fc")
    with pytest.raises(FormatError, match=r"llm_int8_skip_modules has '\('"):
        is_skipped("fc", ["("])


def test_registry() -> None:
    assert {format_for("int"), format_for("nf4"), format_for("fp4")} <= set(FORMATS)
    assert all(name == FORMATS[name].NAME for name in FORMATS)
    assert format_of({"quant_method": "compressed-tensors"}) == "compressed-tensors"
    assert format_of({"load_in_4bit": True}) == format_of({"quant_method": "bitsandbytes"}) == "bitsandbytes"
    assert format_of({"quant_method": "gptq"}) == format_of({"quant_method": "gptq", "format": "gptq"}) == "gptq"
    assert format_of({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}) == "gptq_v2"
    assert format_of({"quant_method": "awq", "version": "gemm"}) == "awq"
    groups = {"config_groups": {"group_0": {"format": "naive-quantized"}}}
    assert format_of({"quant_method": "compressed-tensors", **groups}) == "naive-quantized"
    with pytest.raises(FormatError, match="gptq is stored as 'marlin'"):
        format_of({"quant_method": "gptq", "checkpoint_format": "marlin"})
    with pytest.raises(FormatError, match="quant_method 'hqq'"):
        format_of({"quant_method": "hqq"})
