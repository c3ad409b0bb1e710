"""evaluate() end to end on tiny models: what it records, what it refuses, that it leaves nothing half done."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, BertForQuestionAnswering, T5Config, T5Model

from hf_quant.errors import CheckpointError, EvaluationError
from hf_quant.evaluation import EvaluationResult, Text, evaluate, evaluate_directory, write_results
from hf_quant.evaluation.table import amount, markdown, render

QUICK = {"windows": 3, "length": 32, "repeats": 1, "bootstrap_samples": 100, "progress": False}


@pytest.fixture(scope="module")
def coarse(tiny_llama, tmp_path_factory):
    """The tiny Llama with its linears rounded to 16 levels: a float checkpoint that lost something."""
    path = tmp_path_factory.mktemp("coarse") / "tiny-coarse"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                step = parameter.abs().amax(dim=1, keepdim=True) / 7
                parameter.copy_((parameter / step).round() * step)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def result(coarse, tiny_llama):
    return evaluate(coarse, tiny_llama, **QUICK)


def test_records_everything(result, coarse, tiny_llama):
    assert [text.name for text in result.texts] == ["docs", "prose"]
    for text in result.texts:
        assert text.tokens == 3 * 31
        assert text.kl.low <= text.kl.value <= text.kl.high and text.kl.value > 0
        assert text.kl_p99 >= text.kl.value
        assert 0 < text.top1_agreement.value <= 1
        ratio = text.perplexity_quantized.value / text.perplexity_float.value
        assert text.perplexity_increase_percent.value == pytest.approx(100 * (ratio - 1), abs=1e-4)
        assert text.noise_floor is not None and text.noise_floor.dtype == "bfloat16"
        assert 0 < text.noise_floor.kl.value < text.kl.value
    size = result.size
    assert size.float_disk_bytes == (tiny_llama / "model.safetensors").stat().st_size
    assert size.quantized_disk_bytes == (coarse / "model.safetensors").stat().st_size
    assert size.float_memory_bytes == size.quantized_memory_bytes
    assert size.memory_dtype == "bfloat16"
    assert size.bits_per_weight == 32
    assert [run.model for run in result.speed] == ["float", "quantized"]
    for run in result.speed:
        assert run.dtype == "bfloat16" and run.repeats == 1 and run.threads == torch.get_num_threads()
        assert run.prefill_tokens == 3 * 32 and run.decode_tokens == 64
        assert run.prefill_tokens_per_second > 0 and run.decode_tokens_per_second > 0 and run.load_seconds > 0
        assert run.kernels == {"float": 15}
    assert result.candidate == "tiny-coarse" and result.reference == tiny_llama.name
    assert str(tiny_llama.parent) not in result.model_dump_json()
    assert result.reference_dtype == result.reference_stored_dtype == "float32"
    assert result.candidate_digest is None
    assert result.environment.cores >= 1 and result.environment.versions["torch"] == torch.__version__


def test_written_results_are_read_back(result, tmp_path):
    path = write_results(tmp_path, result)
    assert EvaluationResult.read(path) == result
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]
    path.write_text(path.read_text()[:-50])
    with pytest.raises(EvaluationError, match="not a results file"):
        EvaluationResult.read(path)
    with pytest.raises(EvaluationError, match="does not exist"):
        EvaluationResult.read(tmp_path / "absent.json")
    data = json.loads(result.model_dump_json())
    data["size"]["invented"] = 1
    path.write_text(json.dumps(data))
    with pytest.raises(EvaluationError, match="invented"):
        EvaluationResult.read(path)


def test_directory_and_memory_agree(coarse, tiny_llama, result):
    quick = {**QUICK, "speed": False, "noise_floor": False}
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (coarse, tiny_llama)]
    again = evaluate(*models, **quick)
    for here, there in zip(again.texts, result.texts, strict=True):
        assert here.kl == there.kl and here.perplexity_quantized == there.perplexity_quantized
        assert here.noise_floor is None
    assert again.size == result.size
    assert again.speed == ()


def test_same_seed_same_figures_and_own_text(coarse, tiny_llama, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("It was a bright cold day in April. " * 60)
    quick = {
        **QUICK,
        "speed": False,
        "noise_floor": False,
        "texts": [file, Text("mine", "a test", "lorem ipsum " * 300)],
    }
    first, second = (evaluate(coarse, tiny_llama, seed=5, **quick) for _ in range(2))
    assert first.texts == second.texts
    assert [text.name for text in first.texts] == ["notes.txt", "mine"]
    target = tmp_path / "copy"
    shutil.copytree(coarse, target)
    recorded = evaluate_directory(target, tiny_llama, seed=5, command="hf-quant evaluate", **quick)
    assert EvaluationResult.read(target / "evaluation.json") == recorded
    assert recorded.texts == first.texts and recorded.command == "hf-quant evaluate"


def test_a_16_bit_reference_gets_its_own_noise_floor(tiny_checkpoint):
    path = tiny_checkpoint("llama", dtype=torch.float16)
    quick = {**QUICK, "speed": False, "texts": ["prose"]}
    result = evaluate(path, path, **quick)
    assert result.texts[0].kl.value == 0
    assert result.texts[0].noise_floor.dtype == "float16" and result.texts[0].noise_floor.kl.value > 0
    assert result.reference_stored_dtype == result.size.memory_dtype == "float16"
    assert evaluate(path, path, dtype=torch.bfloat16, **quick).texts[0].noise_floor.dtype == "float32"


def test_tables_show_every_figure(result):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115 - record needs a sink
    console.print(render(result))
    plain, marked = console.export_text(), markdown(result)
    for shown in (plain, marked):
        for text in result.texts:
            assert f"{text.kl.value:.4f}" in shown and f"{text.perplexity_float.value:.2f}" in shown
            assert f"{100 * text.top1_agreement.value:.2f}" in shown and f"{text.noise_floor.kl.value:.4f}" in shown
        for run in result.speed:
            assert f"{run.decode_tokens_per_second:.1f}" in shown
        assert amount(result.size.float_disk_bytes) in shown
    rows = [line for line in marked.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows[:8]} == {8}


def test_kinds_without_a_measure_are_refused(coarse, tmp_path, tiny_llama):
    shape = {"vocab_size": 384, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    asked = BertForQuestionAnswering(BertConfig(**shape, num_attention_heads=2))
    asked.save_pretrained(tmp_path / "bert")
    T5Model(T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "t5"
    )
    for model in (tmp_path / "bert", tmp_path / "t5", asked):
        with pytest.raises(EvaluationError, match="there is no measure for") as caught:
            evaluate(model, model, **QUICK)
        assert "an encoder" in caught.value.fix
    BertForMaskedLM(BertConfig(**shape, num_attention_heads=2)).save_pretrained(tmp_path / "masked")
    with pytest.raises(EvaluationError, match="is loaded by AutoModelForMaskedLM"):
        evaluate(tmp_path / "masked", tiny_llama, **QUICK)
    with pytest.raises(EvaluationError, match=r"'images:\.' is of no use to it"):
        evaluate(coarse, tiny_llama, media="images:.", **QUICK)


def test_incomplete_candidates_are_refused(coarse, tiny_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(coarse, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match=r"missing keys, first model\.layers\.1\.mlp\.up_proj\.weight"):
        evaluate(broken, tiny_llama, **QUICK)
    whole = (coarse / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        evaluate(broken, tiny_llama, **QUICK)
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        evaluate(broken, tiny_llama, **QUICK)


def test_bad_requests_name_the_offender(coarse, tiny_llama, tiny_checkpoint, tmp_path):
    def refused(match, *models, error=EvaluationError, **options):
        with pytest.raises(error, match=match):
            evaluate(*(models or (coarse, tiny_llama)), **{**QUICK, **options})

    refused("does not exist", tmp_path / "nowhere", tiny_llama)
    refused("neither a directory nor a model that can be reached", "no-such-org/no-such-model", tiny_llama)
    refused("no config", tmp_path, tiny_llama)
    refused("no text to measure on", texts=[])
    refused("two texts are called 'prose'", texts=["prose", "prose"])
    refused("windows of 4096 fit", length=4096, windows=100)
    refused("windows=1 gives", windows=1)
    refused("no layer of hf-quant", kernel="reference")
    model = AutoModelForCausalLM.from_pretrained(coarse, dtype=torch.bfloat16)
    refused("candidate is in bfloat16", model, tiny_llama)
    refused("kernel=reference for a model in memory", model, tiny_llama, kernel="reference")
    other = tiny_checkpoint("llama", vocab_size=500)
    refused("500 logits per token", other, tiny_llama)


def test_a_missing_tokenizer_is_named(coarse, tmp_path, tiny_tokenizer):
    bare = tmp_path / "bare"
    shutil.copytree(coarse, bare)
    with pytest.raises(EvaluationError, match="neither model has a tokenizer"):
        evaluate(coarse, bare, **QUICK)
    quick = {**QUICK, "speed": False, "noise_floor": False, "texts": ["prose"]}
    assert evaluate(coarse, bare, tokenizer=tiny_tokenizer, **quick).texts[0].kl.value == 0
