"""The card states what was measured and recorded, nothing else, and survives odd names and missing facts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from hf_quant.card import BaseCard, CheckpointFacts, read_base_card, render, validate_card, with_repo_id, write_card
from hf_quant.checkpoint import atomic_write, checkpoint_digest, read_manifest, write_manifest
from hf_quant.errors import CardError, CheckpointError, EvaluationError
from hf_quant.evaluation.results import (
    Environment,
    EvaluationResult,
    Interval,
    NoiseFloor,
    Protocol,
    RoundedActivations,
    SizeResult,
    SpeedResult,
    TextResult,
)

HIDDEN, LAYERS = 64, 3


def interval(value: float, spread: float = 0.02) -> Interval:
    return Interval(value=value, low=value * (1 - spread), high=value * (1 + spread))


def text_result(name: str = "docs", sha: str = "ab", **changes: Any) -> TextResult:
    fields: dict[str, Any] = {
        "name": name,
        "source": "built-in text",
        "sha256": (sha * 32)[:64],
        "tokens": 8176,
        "perplexity_float": interval(13.4123),
        "perplexity_quantized": interval(14.3511),
        "perplexity_increase_percent": interval(7.012, 0.1),
        "kl": interval(0.2134),
        "kl_p99": 1.913,
        "top1_agreement": interval(0.7812),
        "noise_floor": NoiseFloor(
            dtype="bfloat16", kl=interval(0.00042), top1_agreement=interval(0.9921), perplexity=interval(13.41)
        ),
    }
    return TextResult(**{**fields, **changes})


def measured(digest: str | None = "d" * 64, **changes: Any) -> EvaluationResult:
    common = {"dtype": "float32", "threads": 2, "prefill_tokens": 512, "decode_tokens": 64, "repeats": 5}
    fields: dict[str, Any] = {
        "created": "2026-11-23T12:00:00+00:00",
        "candidate": "tiny-int4",
        "candidate_digest": digest,
        "reference": "/srv/models/base-float",
        "reference_revision": None,
        "reference_dtype": "float32",
        "protocol": Protocol(windows=16, length=512, dtype="float32", device="cpu", seed=0, bootstrap_samples=1000),
        "texts": (text_result(), text_result("prose", "cd", kl=interval(0.2434))),
        "size": SizeResult(
            float_disk_bytes=538_000_000,
            quantized_disk_bytes=173_000_000,
            float_memory_bytes=538_000_000,
            quantized_memory_bytes=172_000_000,
            bits_per_weight=4.5,
        ),
        "speed": (
            SpeedResult(model="float", kernels={}, load_seconds=0.61, prefill_tokens_per_second=905.2,
                        decode_tokens_per_second=27.9, **common),
            SpeedResult(model="quantized", kernels={"cpu": 18, "reference": 3}, load_seconds=0.93,
                        prefill_tokens_per_second=800.1, decode_tokens_per_second=33.48, **common),
        ),
        "environment": Environment(
            machine="Linux x86_64", cpu="Imaginary CPU @ 2.10GHz", cores=2, accelerator=None, python="3.11.2",
            versions={"torch": "2.13.0", "transformers": "5.23.0"},
        ),
        "command": "hf-quant evaluate /tmp/out/tiny-int4 --reference /srv/models/base-float --text docs",
    }  # fmt: skip
    return EvaluationResult(**{**fields, **changes})


def plan_rows(label: str = "int4 sym g32", layers: int = LAYERS, **special: str) -> list[dict[str, Any]]:
    """Rows of a Llama-like plan; ``special`` maps a projection (``down_proj``) to another label."""
    rows: list[dict[str, Any]] = []

    def row(
        name: str, kind: str, shape: tuple[int, ...], label: str, rule: str, note: str = "", tied: bool = False
    ) -> None:
        numel = torch.Size(shape).numel()
        before = 0 if tied else 4 * numel
        rows.append(
            {
                "name": name, "kind": kind, "shape": list(shape), "label": label, "method": "search" if label else "",
                "rule": rule, "note": note, "float_bytes": before,
                "planned_bytes": numel // 2 + numel // 16 + 16 if label else before,
            }
        )  # fmt: skip

    row("model.embed_tokens", "Embedding", (384, HIDDEN), "", "not a linear layer", "embeddings stay in float")
    for index in range(layers):
        for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            found = special.get(leaf.rpartition(".")[2], label)
            row(f"model.layers.{index}.{leaf}", "Linear", (HIDDEN, HIDDEN), found, "default" if found else "skip 'x'")
        row(
            f"model.layers.{index}.input_layernorm",
            "Norm",
            (HIDDEN,),
            "",
            "not a linear layer",
            "vectors stay in float",
        )
    row("lm_head", "Linear", (384, HIDDEN), "", "default skip", "tied to model.embed_tokens.weight", tied=True)
    return rows


def provenance(**changes: Any) -> dict[str, Any]:
    recipe = {
        "bits": 4, "grid": "int", "symmetric": True, "group_size": 32, "method": "search", "double_quant": False,
        "overrides": {}, "skip": [], "on_indivisible": "nearest", "scale_dtype": "auto", "kernel": "auto",
        "dequantize": False, "quant_method": "hf_quant",
    }  # fmt: skip
    fields = {
        "version": "0.1.0", "format": "compressed-tensors", "method": "search", "recipe": recipe,
        "base_model": "org/base-model", "base_revision": "7e27bd9f95328f0f3b08261d1252705110c806f8", "data": None,
        "torch": "2.13.0", "transformers": "5.23.0",
    }  # fmt: skip
    return {**fields, **changes}


def facts(**changes: Any) -> CheckpointFacts:
    fields: dict[str, Any] = {
        "name": "tiny-int4",
        "repo_id": "tiny-int4",
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "files": (("model.safetensors", 173_000_000), ("tokenizer.json", 2_000_000)),
        "chat": True,
    }
    return CheckpointFacts(**{**fields, **changes})


APACHE = BaseCard({"license": "apache-2.0", "language": ["en"]})


def tensors_of(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for row in rows:
        shape = row["shape"]
        if row["label"]:
            tensors[f"{row['name']}.weight_packed"] = torch.zeros(shape[0], shape[1] // 8, dtype=torch.int32)
            tensors[f"{row['name']}.weight_scale"] = torch.zeros(shape[0], shape[1] // 32, dtype=torch.bfloat16)
            tensors[f"{row['name']}.weight_shape"] = torch.tensor(shape)
        elif row["float_bytes"]:
            tensors[f"{row['name']}.weight"] = torch.zeros(shape)
    return tensors


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint directory as hf-quant leaves it, with results; its weights are zeros."""
    directory = tmp_path / "tiny-int4"
    directory.mkdir()
    rows = plan_rows()
    save_file(tensors_of(rows), directory / "model.safetensors")
    made = provenance()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hf_quant": made}
    atomic_write(directory / "config.json", json.dumps(config))
    write_manifest(directory, made, rows, progress=False)
    record(directory)
    return directory


def record(directory: Path, **changes: Any) -> None:
    digest = changes.pop("digest", checkpoint_digest(directory))
    atomic_write(directory / "evaluation.json", measured(digest, **changes).model_dump_json())


# --- what it says


def test_metadata_and_model_index_read_back() -> None:
    data = ModelCard(render(measured(), provenance(), plan_rows(), facts(quantized_by="someone"), APACHE)).data
    assert data.base_model == "org/base-model"
    assert data.base_model_relation == "quantized"
    assert (data.library_name, data.license, data.language) == ("transformers", "apache-2.0", ["en"])
    assert data.pipeline_tag == "text-generation"
    assert data.quantized_by == "someone"
    assert {"hf-quant", "int4", "4-bit", "compressed-tensors"} <= set(data.tags)
    assert data.model_name == "tiny-int4"
    values = {(result.dataset_name, result.metric_type): result for result in data.eval_results}
    assert values["docs", "perplexity"].metric_value == pytest.approx(14.3511)
    assert values["prose", "kl_divergence"].metric_value == pytest.approx(0.2434)
    assert values["docs", "top1_agreement"].metric_value == pytest.approx(0.7812)
    assert values["docs", "kl_divergence"].metric_args == {"confidence_interval_95": [0.209132, 0.217668]}
    assert values["prose", "perplexity"].dataset_args["sha256"] == "cd" * 32


def test_every_figure_of_the_accuracy_table_is_the_measured_one() -> None:
    text = render(measured(), provenance(), plan_rows(), facts(), APACHE)
    quantized = next(line for line in text.splitlines() if "**quantized**" in line)
    cells = [cell.strip() for cell in quantized.strip("|").split("|")]
    assert cells[2] == "14.35 [14.06, 14.64]"
    assert cells[3] == "+7.01 % [+6.31, +7.71]"
    assert cells[4] == "0.213 [0.209, 0.218]"
    assert cells[5] == "1.91"
    assert cells[6] == "78.1 % [76.6, 79.7]"
    assert "| noise floor: float in bfloat16 | 13.41 [13.14, 13.68] |" in text
    assert "0.000420 [0.000412, 0.000428]" in text
    assert 'activations="int8"' not in text
    rounded = RoundedActivations(kl=interval(0.2187), top1_agreement=interval(0.7765), perplexity=interval(14.4))
    results = measured(texts=(text_result(int8_activations=rounded),))
    text = render(results, provenance(), plan_rows(), facts(), APACHE)
    assert '| quantized, with `activations="int8"` | 14.40 [14.11, 14.69] | – | 0.219 [0.214, 0.223] |' in text


def test_claim_is_measured_and_follows_the_direction_of_the_figures() -> None:
    text = render(measured(), provenance(), plan_rows(), facts(), APACHE)
    claim = next(line for line in text.splitlines() if line.startswith("**int4"))
    for fact in (
        "3.1× smaller on disk",
        "538 MB → 173 MB",
        "+7.01 % on docs",
        "KL 0.213 and 0.243",
        "1.2× the decode and 0.88× the prefill speed",
    ):
        assert fact in claim
    slow = measured().speed[1].model_copy(update={"decode_tokens_per_second": 13.95})
    size = measured().size.model_copy(update={"quantized_disk_bytes": 600_000_000})
    changed = measured(speed=(measured().speed[0], slow), size=size)
    worse = render(changed, provenance(), plan_rows(), facts(), APACHE)
    claim = next(line for line in worse.splitlines() if line.startswith("**int4"))
    assert "0.50× the decode" in claim
    assert "no smaller than the float model" in claim
    assert "smaller on disk" not in claim


def test_speed_that_was_not_measured_is_not_claimed() -> None:
    text = render(measured(speed=()), provenance(), plan_rows(), facts(), APACHE)
    assert "Speed was not measured." in text
    assert "tokens/s" not in text
    assert "× the" not in text


def test_machine_kernels_and_versions_are_named() -> None:
    text = render(measured(), provenance(), plan_rows(), facts(), APACHE)
    for fact in (
        "Imaginary CPU @ 2.10GHz",
        "cpu (18), reference (3)",
        "torch 2.13.0",
        "hf-quant 0.1.0",
        "Python 3.11.2",
    ):
        assert fact in text
    assert "none, the method is data-free" in text
    assert "7e27bd9f95328f0f3b08261d1252705110c806f8" in text
    data = {"source": "/home/someone/corpus.txt", "sha256": "e" * 64}
    calibrated = render(measured(), provenance(data=data), plan_rows(), facts(), APACHE)
    assert "Calibration data: `corpus.txt`, SHA-256 `" + "e" * 64 in calibrated


def test_thirty_layers_are_a_few_rows_and_reasons_are_given() -> None:
    text = render(measured(), provenance(), plan_rows(layers=30), facts(), APACHE)
    table = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(table) == 5
    assert "| `model.layers.*.self_attn.{q_proj,o_proj}` | 60 | 64×64 | int4 sym g32 | search | default |" in text
    assert "| `model.layers.*.input_layernorm` | 30 | vectors stay in float |" in text
    assert "tied to model.embed_tokens.weight" in text


def test_layers_treated_differently_are_told_apart() -> None:
    rows = plan_rows(layers=6)
    for row in rows:
        if row["name"].startswith(("model.layers.0.", "model.layers.1.", "model.layers.5.")) and row["label"]:
            row |= {"label": "int8 sym g64", "rule": "override 're:.*'"}
    text = render(measured(), provenance(), rows, facts(), APACHE)
    assert "`model.layers.[0-1,5].mlp.{up_proj,down_proj}` | 6 | 64×64 | int8 sym g64" in text
    assert "`model.layers.[2-4].mlp.{up_proj,down_proj}` | 6 | 64×64 | int4 sym g32" in text
    assert {"int4", "int8", "4-bit", "8-bit"} <= set(ModelCard(text).data.tags)
    assert "int4, symmetric, one scale per 32 weights (50 %)" in text


def test_a_layer_left_in_float_is_named_and_not_counted_as_quantized() -> None:
    rows = plan_rows(layers=4)
    kept = next(row for row in rows if row["name"] == "model.layers.2.mlp.up_proj")
    kept |= {"label": None, "method": "", "rule": "skip 'x'", "note": "left in float on request"}
    text = render(measured(), provenance(), rows, facts(), APACHE)
    assert "| `model.layers.2.mlp.up_proj` | 1 | left in float on request |" in text
    assert "`model.layers.[0-1,3].mlp.up_proj` | 3 |" in text
    assert "`model.layers.*.mlp.down_proj` | 4 |" in text


@pytest.mark.parametrize(
    ("label", "special", "expected"),
    [
        ("int4 sym g32", {}, True),
        ("int4 asym g32", {}, True),
        ("int8 sym g64", {}, False),
        ("int4 sym per-channel", {}, False),
        ("int4 sym g32", {"down_proj": "int8 sym g64"}, False),
        ("int4 sym g32", {"down_proj": ""}, False),
    ],
)
def test_vllm_is_offered_only_for_what_it_holds(label: str, special: dict[str, str], expected: bool) -> None:
    text = render(measured(), provenance(), plan_rows(label, **special), facts(), APACHE)
    assert ("vllm serve tiny-int4" in text) is expected
    assert ("not run here" in text) is expected


def test_vllm_is_not_offered_for_widths_it_cannot_take() -> None:
    rows = plan_rows()
    rows[1]["shape"] = [48, 64]
    assert "vllm serve" not in render(measured(), provenance(), rows, facts(), APACHE)


def test_vllm_is_not_offered_for_experts() -> None:
    rows = plan_rows()
    assert "vllm" in render(measured(), provenance(), rows, facts(), APACHE)
    for row in rows:
        row["name"] = row["name"].replace(".mlp.", ".mlp.experts.0.")
    assert "vllm" not in render(measured(), provenance(), rows, facts(), APACHE)


def test_asymmetric_needs_the_argument_and_bitsandbytes_its_package() -> None:
    asymmetric = render(measured(), provenance(), plan_rows("int4 asym g32"), facts(), APACHE)
    assert "CompressedTensorsConfig(dequantize=True)" in asymmetric
    table = render(measured(), provenance(format="bitsandbytes"), plan_rows("nf4 g64 dq"), facts(), APACHE)
    assert "accelerate bitsandbytes`" in table
    assert "CompressedTensorsConfig" not in table
    assert "vllm" not in table
    assert {"nf4", "4-bit", "bitsandbytes"} <= set(ModelCard(table).data.tags)


def test_what_stock_transformers_cannot_load_is_not_offered_to_it() -> None:
    why = "Stock transformers cannot load the experts of gpt_oss stored one by one: `import hf_quant` first."
    text = render(measured(), provenance(stock_loading=why), plan_rows(), facts(), APACHE)
    assert why in text and "**Stock transformers**" not in text and "**With hf-quant**" in text
    expanded = "Stock transformers loads it with `CompressedTensorsConfig(dequantize=True)`."
    text = render(measured(), provenance(stock_loading=expanded), plan_rows(), facts(), APACHE)
    assert "quantization_config=CompressedTensorsConfig(dequantize=True),  # the weights are expanded at load" in text


def test_a_loss_inside_the_noise_is_called_that() -> None:
    nothing = text_result(kl=interval(0.0004), perplexity_increase_percent=Interval(value=0.01, low=-0.1, high=0.2))
    text = render(measured(texts=(nothing,)), provenance(), plan_rows(), facts(), APACHE)
    assert "within the noise floor" in text
    unclear = text_result(perplexity_increase_percent=Interval(value=0.5, low=-0.1, high=1.1), noise_floor=None)
    text = render(measured(texts=(unclear,)), provenance(), plan_rows(), facts(), APACHE)
    assert "cannot be told from zero" in text
    assert "noise floor: float" not in text


# --- what it refuses


def test_unmeasured_card_says_so_and_holds_no_figures() -> None:
    text = render(None, provenance(), plan_rows(), facts(), APACHE)
    assert "**Not measured.**" in text
    assert ModelCard(text).data.eval_results is None
    assert "The accuracy of this checkpoint was not measured" in text
    assert "nats" not in text
    assert "tokens/s" not in text


def test_without_results_it_refuses_unless_allowed(checkpoint: Path) -> None:
    (checkpoint / "evaluation.json").unlink()
    with pytest.raises(CardError, match="hf-quant evaluate"):
        write_card(checkpoint, base_card=APACHE)
    assert not (checkpoint / "README.md").exists()
    text = write_card(checkpoint, base_card=APACHE, allow_unmeasured=True).read_text()
    assert "**Not measured.**" in text
    assert not (checkpoint / "plots" / "kl.png").exists()


@pytest.mark.parametrize("digest", ["e" * 64, None])
def test_results_of_another_checkpoint_are_refused(checkpoint: Path, digest: str | None) -> None:
    record(checkpoint, digest=digest)
    with pytest.raises(CardError, match=r"another checkpoint|which checkpoint"):
        write_card(checkpoint, base_card=APACHE, allow_unmeasured=True)
    assert not (checkpoint / "README.md").exists()


def test_figures_that_are_not_finite_are_refused() -> None:
    broken = measured(texts=(text_result(kl=Interval(value=float("nan"), low=0, high=1)),))
    with pytest.raises(CardError, match=r"kl on 'docs'"):
        render(broken, provenance(), plan_rows(), facts(), APACHE)


def test_changed_files_and_contradictions_are_refused(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(CardError, match=r"model\.safetensors"):
        write_card(checkpoint, base_card=APACHE)
    weights.write_bytes(whole)
    write_manifest(checkpoint, provenance(method="absmax"), plan_rows(), progress=False)
    with pytest.raises(CardError, match="disagree about method"):
        write_card(checkpoint, base_card=APACHE)


def test_foreign_directories_and_broken_results_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        write_card(tmp_path / "nowhere")
    (checkpoint / "evaluation.json").write_text("{}")
    with pytest.raises(EvaluationError):
        write_card(checkpoint, base_card=APACHE)


def test_missing_provenance_is_named() -> None:
    incomplete = provenance()
    del incomplete["recipe"]
    with pytest.raises(CardError, match="recipe"):
        render(measured(), incomplete, plan_rows(), facts(), APACHE)
    with pytest.raises(CardError, match="not recorded"):
        render(measured(), provenance(data={"path": "x"}), plan_rows(), facts(), APACHE)
    sparse = provenance()
    del sparse["data"], sparse["base_revision"], sparse["torch"]
    assert "data-free" in render(measured(), sparse, plan_rows(), facts(), APACHE)
    with pytest.raises(CardError, match="no quantized layer"):
        render(measured(), provenance(), plan_rows(""), facts(), APACHE)


# --- the base model


def test_license_is_inherited_as_the_hub_takes_it() -> None:
    def metadata(base: BaseCard, **changes: Any) -> tuple[dict[str, Any], str]:
        text = render(measured(), provenance(**changes), plan_rows(), facts(), base)
        return ModelCard(text).data.to_dict(), text

    data, text = metadata(BaseCard({}))
    assert "license" not in data
    assert "states no license" in text
    data, text = metadata(BaseCard(problem="the Hub could not be reached"))
    assert "license" not in data
    assert "could not be read" in text and "the Hub could not be reached" in text
    data, text = metadata(BaseCard({"license": "Apache-2.0"}))
    assert data["license"] == "apache-2.0"
    data, text = metadata(BaseCard({"license": "My Own License v1"}))
    assert (data["license"], data["license_name"]) == ("other", "my-own-license-v1")
    own = {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE"}
    data, text = metadata(BaseCard(own))
    assert data["license_link"] == "https://huggingface.co/org/base-model/blob/main/LICENSE"
    assert "[qwen-research](https://huggingface.co/org/base-model/blob/main/LICENSE)" in text
    data, text = metadata(BaseCard(own), base_model="/srv/models/base")
    assert "license_link" not in data


def test_language_and_pipeline_tag_of_the_base() -> None:
    base = BaseCard({"language": [False, "zh", "zh", 7, "a language"], "pipeline_tag": "image-text-to-text"})
    data = ModelCard(render(measured(), provenance(), plan_rows(), facts(), base)).data
    assert data.language == ["no", "zh"]
    assert data.pipeline_tag == "image-text-to-text"
    strange = facts(architecture="BrandNewThing", model_type="new")
    assert ModelCard(render(measured(), provenance(), plan_rows(), strange, BaseCard())).data.pipeline_tag is None


@pytest.mark.parametrize("path", ["/srv/models/Мой-base", "C:\\Users\\me\\Мой-base", "./runs/Мой-base", "~/x/Мой-base"])
def test_local_base_model_is_shown_by_name_only(path: str) -> None:
    text = render(measured(), provenance(base_model=path, base_revision=None), plan_rows(), facts(), APACHE)
    data = ModelCard(text).data
    assert data.base_model is None
    assert "base_model_relation" not in data.to_dict()
    assert "`Мой-base`" in text
    assert path not in text
    for leak in ("/srv", "Users", "runs/", "~/x", "/tmp/out"):
        assert leak not in text
    assert "hf-quant evaluate tiny-int4 --reference base-float --text docs" in text


def test_bare_name_without_a_commit_is_not_taken_for_a_hub_id() -> None:
    local = render(measured(), provenance(base_model="gpt2", base_revision=None), plan_rows(), facts(), APACHE)
    assert ModelCard(local).data.base_model is None
    hub = render(measured(), provenance(base_model="gpt2"), plan_rows(), facts(), APACHE)
    assert ModelCard(hub).data.base_model == "gpt2"


def test_base_card_is_read_from_a_directory(tmp_path: Path) -> None:
    assert read_base_card(str(tmp_path)) == BaseCard()
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: no\n---\n# x\n", encoding="utf-8")
    assert read_base_card(str(tmp_path)).metadata["license"] == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")
    assert "cannot be parsed" in read_base_card(str(tmp_path)).problem
    (tmp_path / "README.md").write_text("no metadata at all", encoding="utf-8")
    assert read_base_card(str(tmp_path)) == BaseCard()
    assert read_base_card(None).problem
    assert "not a Hub id" in read_base_card("a/b/c/d").problem


def test_local_base_with_a_given_hub_id(checkpoint: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    made = provenance(base_model=str(base), base_revision=None)
    config = yaml.safe_load((checkpoint / "config.json").read_text())
    atomic_write(checkpoint / "config.json", json.dumps(config | {"hf_quant": made}))
    write_manifest(checkpoint, made, plan_rows(), progress=False)
    record(checkpoint)
    data = ModelCard(write_card(checkpoint).read_text()).data
    assert (data.base_model, data.license) == (None, "mit")
    data = ModelCard(write_card(checkpoint, base_model="org/name").read_text()).data
    assert (data.base_model, data.license) == ("org/name", "mit")
    text = (checkpoint / "README.md").read_text()
    assert "from a local copy named `base`" in text  # what was quantized is not passed off as the Hub's files
    assert "hf-quant quantize base --recipe" in text
    with pytest.raises(CardError, match="not a Hub id"):
        write_card(checkpoint, base_model="not a hub/id/at all")


# --- escaping


def test_odd_names_stay_inside_their_cells() -> None:
    odd = "a|b `c` *d* <script>alert(1)</script> [x](y) $z$ # {{ 7*7 }} {% raw %}\n| injected | row |"
    rows = plan_rows()
    rows[0]["note"] = odd
    rows[1]["name"] = "weird|name.`0`.x"
    results = measured(texts=(text_result(odd), text_result("中文 / ünï", "cd"), text_result("???", "ef")))
    environment = results.environment.model_copy(update={"cpu": odd})
    results = results.model_copy(update={"environment": environment})
    text = render(results, provenance(), rows, facts(name=odd, repo_id='we"ird'), BaseCard({"license": odd}))
    card = ModelCard(text)
    assert {result.dataset_name for result in card.data.eval_results} >= {"中文 / ünï", "???"}
    assert len({result.dataset_type for result in card.data.eval_results}) == 3
    assert 'repo_id = "we\\"ird"' in text
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    inline = [child for token in tokens for child in token.children or ()]
    assert [token.content for token in tokens if token.type == "html_block"] == [
        '<!-- hf-quant: snippets load "we\\"ird" -->\n'
    ]
    assert not [child for child in inline if child.type in ("html_inline", "em_open")]
    assert {child.attrs["href"] for child in inline if child.type == "link_open"} == {
        "https://huggingface.co/org/base-model"
    }
    shown = " ".join(odd.split())
    headings = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert "".join(child.content for child in headings[0].children or ()) == shown
    cells = ["".join(child.content for child in tokens[i + 1].children or ())
             for i, token in enumerate(tokens) if token.type == "td_open"]  # fmt: skip
    assert cells.count(shown) == 2  # the text's name, and why the embedding stays in float
    assert "weird|name.`0`.x" in cells


def test_every_table_has_as_many_cells_as_its_header() -> None:
    text = render(measured(), provenance(), plan_rows(), facts(), APACHE)
    block: list[str] = []
    tables = 0
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            block.append(line)
        elif block:
            tables += 1
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block}) == 1, block
            assert re.fullmatch(r"[|\-]+", block[1])
            block = []
    assert tables == 5
    assert not re.search(r"\n{4,}", text)


# --- validation


def broken(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("---\n", "", "no metadata block"),
        ("library_name: transformers\n", "", "library_name"),
        ("- hf-quant\n", "", "tags"),
        ("license: apache-2.0", "license: Apache License", "license"),
        ("license: apache-2.0", "license: other", "license_name"),
        ("- en\n", "- no\n", "language"),
        ("base_model: org/base-model", "base_model: /org/base-model", "base_model"),
        ("base_model_relation: quantized", "base_model_relation: better", "base_model_relation"),
        ("pipeline_tag: text-generation", "pipeline_tag: Text Generation", "pipeline_tag"),
        ("model-index:\n- name: tiny-int4", "model-index:\n- title: tiny-int4", "without a name"),
        ("value: 14.3511", "value: good", "not a finite number"),
        ("value: 14.3511", "value: .nan", "not a finite number"),
        ("type: docs", "kind: docs", "dataset"),
        ("tags:\n", "tags: [\n", "YAML"),
        ("## Limits", "## Limits\n\nsee /home/someone/notes.md", "machine that made it"),
        ("## Limits", "## Limits\n\nsee C:\\Users\\someone\\notes", "machine that made it"),
        ("## Limits", "## Limits\n\n[More Information Needed]", "placeholder"),
    ],
)
def test_validation_names_what_is_wrong(old: str, new: str, complaint: str) -> None:
    text = render(measured(), provenance(), plan_rows(), facts(), APACHE)
    validate_card(text)
    with pytest.raises(CardError, match=complaint):
        validate_card(broken(text, old, new))


def test_links_and_endpoints_are_no_paths() -> None:
    text = render(measured(), provenance(), plan_rows(), facts(), APACHE)
    validate_card(
        text + "\nhttps://huggingface.co/org/name/blob/main/x.md and `/v1/chat/completions`, tokens/s, a/b/c\n"
    )


def test_images_must_exist(tmp_path: Path) -> None:
    text = render(measured(), provenance(), plan_rows(), facts(plots=(("plots/kl.png", "KL"),)), APACHE)
    assert "![KL](plots/kl.png)" in text
    with pytest.raises(CardError, match=r"plots/kl\.png"):
        validate_card(text, tmp_path)


# --- files


def test_write_card_writes_card_and_plots_and_is_repeatable(checkpoint: Path) -> None:
    path = write_card(checkpoint, base_card=APACHE)
    assert path == checkpoint / "README.md"
    first = {file: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()}
    names = {file.relative_to(checkpoint).as_posix() for file in first}
    assert {f"plots/{name}{suffix}" for name in ("kl", "bytes", "blocks") for suffix in (".png", ".svg")} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(plan_rows()).values())
    assert f"{stored / 1e3:.0f} kB stored here" in path.read_text()
    validate_card(path.read_text(), checkpoint)
    (checkpoint / "plots" / "old.png").write_bytes(b"stale")
    write_card(checkpoint, base_card=APACHE)
    assert {file: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()} == first
    assert read_manifest(checkpoint).provenance == provenance()


def test_bytes_come_from_the_files_or_are_called_planned() -> None:
    rows = plan_rows()
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors_of(rows).items()}
    read = render(measured(), provenance(), rows, facts(tensors=sizes), APACHE)
    assert "Float → stored" in read
    other_names = render(measured(), provenance(), rows, facts(tensors={"other": 5}), APACHE)
    assert "Float → planned" in other_names
    # names that differ, with the plan's total to the byte: what was planned is what is stored
    total = sum(row["planned_bytes"] for row in rows)
    renamed = render(measured(), provenance(), rows, facts(tensors={"other": total - 7, "another": 7}), APACHE)
    assert "Float → stored" in renamed


def test_plots_of_names_without_glyphs_and_of_zero_divergence(checkpoint: Path) -> None:
    zero = Interval(value=0.0, low=0.0, high=0.0)
    record(checkpoint, texts=(text_result("漢字"), text_result("$x^2$", "cd", kl=zero, noise_floor=None)))
    assert "![" in write_card(checkpoint, base_card=APACHE).read_text()
    assert (checkpoint / "plots" / "kl.png").read_bytes().startswith(b"\x89PNG")


def test_template_is_in_one_place() -> None:
    root = Path(__file__).resolve().parent.parent
    assert (root / "model_cards" / "template.md").is_file()
    assert not (root / "hf_quant" / "card_template.md").exists()
    assert "card_template.md" in (root / "pyproject.toml").read_text()


# --- snippets


def snippets(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_repo_id_is_put_into_the_snippets_only() -> None:
    text = render(measured(), provenance(), plan_rows(), facts(), APACHE)
    pushed = with_repo_id(text, "org/tiny--int4")
    assert all('repo_id = "org/tiny--int4"\n' in snippet for snippet in snippets(pushed))
    assert "vllm serve org/tiny--int4\n" in pushed
    assert "# tiny-int4\n" in pushed
    assert with_repo_id(pushed, "org/tiny--int4") == pushed
    assert with_repo_id(pushed, "tiny-int4") == text
    assert with_repo_id("a card of somebody else", "org/x") == "a card of somebody else"
    validate_card(pushed)


@pytest.mark.parametrize(
    ("architecture", "auto"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("BertModel", "AutoModel"),
        ("BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("Gemma3ForConditionalGeneration", "AutoModelForImageTextToText"),
        ("WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq"),
    ],
)
@pytest.mark.parametrize("label", ["int4 sym g32", "int4 asym g32", "nf4 g64 dq"])
@pytest.mark.parametrize("custom", [False, True])
def test_snippets_are_python_for_every_shape_of_model(architecture: str, auto: str, label: str, custom: bool) -> None:
    import transformers

    kind = "bitsandbytes" if label.startswith("nf4") else "compressed-tensors"
    given = facts(architecture=architecture, model_type=architecture.split("For")[0].lower(), custom_code=custom)
    text = render(measured(), provenance(format=kind), plan_rows(label), given, APACHE)
    found = snippets(text)
    assert len(found) == 2
    for snippet in found:
        compile(snippet, "snippet", "exec")
        assert f"{auto}.from_pretrained(" in snippet
        assert ("trust_remote_code=True" in snippet) is custom
    assert hasattr(transformers, auto)


@pytest.mark.slow
def test_printed_snippets_run_as_they_are(tmp_path: Path, tiny_llama: Path) -> None:
    """Each snippet runs unchanged beside the checkpoint: the stock ones without hf_quant, ours with packed weights."""
    import hf_quant

    after = {
        0: "import sys\nassert 'hf_quant' not in sys.modules",
        1: "assert any(type(module).__name__ == 'QuantLinear' for module in model.modules())",
    }
    programs: dict[int, list[str]] = {0: [], 1: []}
    for name, settings in (("sym", {}), ("asym", {"symmetric": False}), ("table", {"grid": "nf4"})):
        directory = tmp_path / name
        hf_quant.quantize(str(tiny_llama), hf_quant.HfQuantConfig(**settings), directory)
        record(directory)
        found = snippets(write_card(directory, base_card=APACHE).read_text())
        assert all(f'repo_id = "{name}"\n' in snippet and "apply_chat_template" in snippet for snippet in found)
        for index, snippet in enumerate(found):
            programs[index] += [snippet.replace("max_new_tokens=64", "max_new_tokens=2"), after[index]]
    for index, parts in programs.items():
        (tmp_path / f"program{index}.py").write_text("\n".join(parts), encoding="utf-8")
        root = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, f"program{index}.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
