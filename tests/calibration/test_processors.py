"""Processors beside a model: without their part for videos where torchvision is missing, else one clear error."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers

from hf_quant.calibration.processors import image_prompt, load_part, reads_videos
from hf_quant.errors import CalibrationError, DependencyError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kinds

pytest.importorskip("PIL", reason="the optional package pillow is not installed")
without_torchvision = pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed here")


@pytest.fixture(scope="module")
def qwen2_vl(tmp_path_factory, tiny_tokenizer):
    return kinds.save("qwen2_vl", tmp_path_factory.mktemp("qwen2_vl"), tiny_tokenizer)


@without_torchvision
def test_a_processor_of_images_and_videos_reads_images_without_torchvision(qwen2_vl):
    with pytest.raises(ImportError, match="Torchvision"):
        transformers.AutoProcessor.from_pretrained(qwen2_vl)
    processor = load_part("processor", qwen2_vl)
    assert processor.image_processor.merge_size == 2 and not hasattr(processor, "video_processor")
    text = image_prompt(processor, "What?")
    assert text == "<user><|vision_start|><|image_pad|><|vision_end|>What?</s><assistant>"


@without_torchvision
def test_an_image_processor_that_needs_torchvision_is_refused_by_name(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "DINOv3ViTImageProcessor"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov3_vit"}))
    with pytest.raises(DependencyError, match=rf"image processor of {tmp_path.name} needs torchvision: it is not inst"):
        load_part("image_processor", tmp_path)


def test_a_torchvision_of_another_torch_is_named(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms is gone')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)

    def fails(*args: object, **kwargs: object) -> None:  # as transformers does beside such a torchvision
        try:
            raise RuntimeError("operator torchvision::nms is gone")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'AutoImageProcessor'.") from error

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", fails)
    with pytest.raises(DependencyError, match=r"installed but cannot be imported \(operator torchvision::nms is gone"):
        load_part("image_processor", tmp_path)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(OSError, match="preprocessor_config") as caught:
        load_part("image_processor", tmp_path)
    assert not isinstance(caught.value, DependencyError)
    with pytest.raises(CalibrationError, match="neither a chat template nor an image token"):
        image_prompt(object(), "What?")


def test_which_processors_read_videos():
    assert reads_videos("qwen2_vl") and not reads_videos("llava") and not reads_videos("unheard")
