"""Checkpoints made by hf-quant under evaluation: digest, bits, kernels, and the same figures on every kernel."""

from __future__ import annotations

import shutil

import pytest

import hf_quant
from hf_quant.checkpoint import checkpoint_digest, read_manifest
from hf_quant.errors import CheckpointError, HfQuantError
from hf_quant.evaluation import evaluate, evaluate_directory
from hf_quant.evaluation.table import markdown
from hf_quant.kernels import native_library

QUICK = {"windows": 3, "length": 32, "repeats": 1, "bootstrap_samples": 100, "progress": False, "texts": ["prose"]}


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "tiny-int4"
    hf_quant.quantize(str(tiny_llama), hf_quant.HfQuantConfig(bits=4, group_size=32), path)
    return path


def test_records_bits_kernels_and_digest(checkpoint, tiny_llama):
    result = evaluate_directory(checkpoint, tiny_llama, kernel="reference", **QUICK)
    assert result.candidate_digest == checkpoint_digest(checkpoint)
    assert result.size.bits_per_weight == pytest.approx(4.5)
    before, after = result.speed
    assert before.kernels == {"float": 15}
    assert result.accuracy_kernels == {"reference": 14, "float": 1}
    assert after.kernels == {"reference": 14, "float": 1}
    assert result.size.quantized_memory_bytes < result.size.float_memory_bytes
    assert result.texts[0].kl.value > 0
    # the results are no part of what the digest names
    assert "evaluation.json" not in read_manifest(checkpoint).files
    assert checkpoint_digest(checkpoint) == result.candidate_digest


def test_kernels_agree(checkpoint, tiny_llama):
    quick = {**QUICK, "speed": False, "noise_floor": False}
    automatic, reference = (
        evaluate_directory(checkpoint, tiny_llama, kernel=k, **quick) for k in ("auto", "reference")
    )
    assert automatic.texts[0].kl.value == pytest.approx(reference.texts[0].kl.value, rel=0.05)
    with pytest.raises(HfQuantError, match="no-such-kernel"):
        evaluate_directory(checkpoint, tiny_llama, kernel="no-such-kernel", **quick)


@pytest.mark.skipif(native_library.unavailable() is not None, reason="no kernel rounds activations here")
def test_int8_activations_are_measured_beside_float_ones(checkpoint, tiny_llama):
    quick = {**QUICK, "speed": False, "noise_floor": False}
    both = evaluate(checkpoint, tiny_llama, **quick)
    assert both.accuracy_kernels == {"native (float activations)": 14, "float": 1}
    rounded = both.texts[0].int8_activations
    alone = evaluate(checkpoint, tiny_llama, activations="int8", **quick)
    assert alone.accuracy_kernels == {"native (int8 activations)": 14, "float": 1}
    assert (rounded.kl, rounded.perplexity) == (alone.texts[0].kl, alone.texts[0].perplexity_quantized)
    assert rounded.kl != both.texts[0].kl
    assert alone.texts[0].int8_activations is None
    assert "quantized, int8 activations" in markdown(both)
    for options in ({"kernel": "reference"}, {"int8_activations": False}):
        assert evaluate(checkpoint, tiny_llama, **quick, **options).texts[0].int8_activations is None


def test_a_changed_file_is_not_measured(checkpoint, tiny_llama, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(checkpoint, changed)
    (changed / "evaluation.json").unlink(missing_ok=True)
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        evaluate_directory(changed, tiny_llama, **QUICK)
    assert not (changed / "evaluation.json").exists()


def test_a_model_in_memory_measures_like_its_directory(checkpoint, tiny_llama):
    quick = {**QUICK, "speed": False, "noise_floor": False}
    model = hf_quant.load(checkpoint, dtype="float32")
    here, there = evaluate(model, tiny_llama, **quick), evaluate(checkpoint, tiny_llama, **quick)
    assert here.texts[0].kl == there.texts[0].kl
    assert here.size.bits_per_weight == there.size.bits_per_weight
    assert here.size.quantized_memory_bytes == there.size.quantized_memory_bytes
