"""Images with questions: what models that answer about images are calibrated on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from hf_quant.calibration import load_calibration
from hf_quant.calibration.seeing import QUESTIONS, continued
from hf_quant.errors import CalibrationError
from hf_quant.evaluation import synthetic
from hf_quant.quantize.sensitivity import take_samples

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kinds

pytest.importorskip("PIL", reason="the optional package pillow is not installed")
IMAGE_TOKENS = {"llava": kinds.IMAGE_TOKEN, "qwen2_vl": kinds.SEEN[0]}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos+more")
    synthetic.images(folder, 5, 0)
    return folder


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def seeing(request, tmp_path_factory, tiny_tokenizer):
    """(name, directory) of a tiny model that answers about images."""
    return request.param, kinds.save(request.param, tmp_path_factory.mktemp(request.param), tiny_tokenizer)


def test_a_question_beside_every_image_and_an_answer_behind_it(seeing, images):
    name, directory = seeing
    source = f"images:{images}"
    data = load_calibration(source, directory=directory, samples=4)
    assert (data.samples, data.source) == (4, f"images:{images.name}")  # a + in the folder's name joins nothing
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    said = []
    for batch in data.batches:
        ids = batch["input_ids"]
        assert ids.shape == batch["attention_mask"].shape
        # image tokens stand where the processor put them, and nowhere in the answer
        seen = (ids == IMAGE_TOKENS[name]).sum(1)
        assert (seen == (16 if name == "llava" else 4)).all()
        assert torch.isfinite(model(**batch).logits).all()
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        for text in texts:
            (question,) = [question for question in QUESTIONS if question in text]
            said.append(text.partition(question)[2].removeprefix("<assistant>"))
    assert len(said) == 4 and all(said)  # the random model never answers with nothing here
    assert load_calibration(source, directory=directory, samples=4).sha256 == data.sha256
    assert load_calibration(source, directory=directory, samples=4, seed=1).sha256 != data.sha256


def test_joined_with_texts(seeing, images, tmp_path):
    _, directory = seeing
    (tmp_path / "photos").symlink_to(images)
    data = load_calibration(f"docs+images:{tmp_path / 'photos'}", directory=directory, samples=7, length=32)
    assert (data.samples, data.source) == (7, "docs+images:photos")
    counts = {True: 0, False: 0}
    for batch in data.batches:
        sees = "pixel_values" in batch
        assert sees or set(batch) == {"input_ids"}
        counts[sees] += len(batch["input_ids"])
    assert counts == {True: 3, False: 4}
    # those who look at a few samples see both kinds, images first
    few = take_samples(data.batches, 4)
    assert ["pixel_values" in sample for sample in few] == [True, False, True, False]


def test_text_alone_is_said_to_leave_layers_without_data(seeing, caplog):
    _, directory = seeing
    load_calibration("docs", directory=directory, samples=2, length=32)
    assert "Join a folder of images: images:DIR+docs" in caplog.text


def test_refusals(seeing, images, tmp_path, tiny_checkpoint):
    _, directory = seeing
    with pytest.raises(CalibrationError, match="cannot be calibrated on audio"):
        load_calibration(f"images:{images}+audio:{tmp_path}", directory=directory)
    with pytest.raises(CalibrationError, match=r"LlamaForCausalLM reads text, it cannot be calibrated on images"):
        load_calibration(f"images:{images}+docs", directory=tiny_checkpoint("llama"))
    with pytest.raises(CalibrationError, match="has no images"):
        load_calibration(f"docs+images:{tmp_path}", directory=directory)
    model = AutoModelForImageTextToText.from_pretrained(directory)
    model.config.get_text_config().max_position_embeddings = 20
    with pytest.raises(CalibrationError, match=r"an image and a question take \d+ tokens, .* has positions for 20"):
        load_calibration(f"images:{images}", directory=directory, model=model, samples=2)
    only_text = tmp_path / "text"
    model.save_pretrained(only_text)
    AutoTokenizer.from_pretrained(directory).save_pretrained(only_text)
    with pytest.raises(CalibrationError, match=r"reads no images|has no processor that loads"):
        load_calibration(f"images:{images}", directory=only_text, samples=2)


def test_continued():
    inputs = {
        "input_ids": torch.tensor([[5, 6]]),
        "attention_mask": torch.tensor([[1, 1]]),
        "mm_token_type_ids": torch.tensor([[1, 0]]),
        "pixel_values": torch.zeros(1, 2),
    }
    longer = {key: value.tolist() for key, value in continued(inputs, [7]).items()}
    assert longer == {
        "input_ids": [[5, 6, 7]],
        "attention_mask": [[1, 1, 1]],
        "mm_token_type_ids": [[1, 0, 0]],
        "pixel_values": [[0, 0]],
    }
