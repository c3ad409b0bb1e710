"""Images and sound through the processors of tiny vision and speech models."""

from __future__ import annotations

import wave

import numpy as np
import pytest
import torch
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from hf_quant.calibration import load_calibration, media
from hf_quant.calibration.media import read_sound, resample
from hf_quant.errors import CalibrationError


def _tone(seconds: float, rate: int, frequency: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)


def _write(path, sound: np.ndarray, rate: int, width: int = 2, channels: int = 1) -> None:
    if width == 1:
        raw = (sound * 127 + 128).astype(np.uint8).tobytes()
    else:
        wide = (sound * (2**31 - 1)).astype("<i4")
        raw = wide.view(np.uint8).reshape(-1, 4)[:, 4 - width :].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    for number in range(4):
        _write(folder / f"{number}.wav", _tone(0.3 if number < 3 else 0.4, 16_000, 200.0 * (number + 1)), 16_000)
    (folder / "notes.txt").write_text("not a sound")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    pytest.importorskip("PIL", reason="the optional package pillow is not installed")
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    path = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    path = tmp_path_factory.mktemp("whisper")
    config = WhisperConfig(
        vocab_size=100,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=50,
        max_target_positions=24,
        decoder_start_token_id=3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    WhisperForConditionalGeneration(config).save_pretrained(path)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(path)
    return path


def test_images(vit, tmp_path):
    from PIL import Image

    (tmp_path / "more").mkdir()
    generator = np.random.default_rng(0)
    for number in range(5):
        pixels = generator.integers(0, 255, (20 + number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / ("more" if number % 2 else ".") / f"{number}.png")
    Image.fromarray(generator.integers(0, 255, (9, 9), dtype=np.uint8)).save(tmp_path / "grey.jpg")
    (tmp_path / "notes.txt").write_text("not an image")
    source = f"images:{tmp_path}"
    data = load_calibration(source, directory=vit, samples=6, batch_size=4)
    assert [tuple(batch["pixel_values"].shape) for batch in data.batches] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    assert (data.samples, data.tokens, data.source) == (6, 0, f"images:{tmp_path.name}")
    model = ViTForImageClassification.from_pretrained(vit)
    assert torch.isfinite(model(**data.batches[0]).logits).all()
    three = [load_calibration(source, directory=vit, samples=3, seed=seed).sha256 for seed in (0, 0, 1)]
    assert three[0] == three[1] != three[2]
    assert (
        load_calibration(source, directory=vit, samples=100).sha256
        == load_calibration(source, directory=vit, samples=6).sha256
    )
    with pytest.raises(CalibrationError, match="reads image, it cannot be calibrated on 'self'"):
        load_calibration("self", directory=vit)
    with pytest.raises(CalibrationError, match="reads image, it cannot be calibrated on audio"):
        load_calibration(f"audio:{tmp_path}", directory=vit)
    (tmp_path / "broken.png").write_bytes(b"not a png")
    with pytest.raises(CalibrationError, match=r"broken\.png cannot be read"):
        load_calibration(source, directory=vit, samples=100)
    (tmp_path / "none").mkdir()
    with pytest.raises(CalibrationError, match="has no images"):
        load_calibration(f"images:{tmp_path / 'none'}", directory=vit)
    with pytest.raises(CalibrationError, match="does not exist"):
        load_calibration(f"images:{tmp_path / 'absent'}", directory=vit)


def test_whisper_hears_and_answers(whisper, sounds):
    data = load_calibration(f"audio:{sounds}", directory=whisper, samples=4, length=64)
    assert (data.samples, data.tokens, data.source) == (4, 0, f"audio:{sounds.name}")
    model = WhisperForConditionalGeneration.from_pretrained(whisper)
    lengths = []
    for batch in data.batches:
        assert batch["input_features"].shape[1:] == (8, 100)
        ids = batch["decoder_input_ids"]
        assert (ids[:, 0] == 3).all() and not (ids == 2).any()
        lengths.append(ids.shape[1])
        assert torch.isfinite(model(**batch).logits).all()
    assert max(lengths) > 1 and max(lengths) <= 23  # the model has 24 target positions
    assert load_calibration(f"audio:{sounds}", directory=whisper, samples=4, length=64).sha256 == data.sha256


def test_clips_of_unequal_length_share_no_batch(sounds, tmp_path):
    config = Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    model = Wav2Vec2ForCTC(config).eval()
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    data = load_calibration(f"audio:{sounds}", directory=None, model=model, processor=extractor, batch_size=2)
    assert [tuple(batch["input_values"].shape) for batch in data.batches] == [(2, 4800), (1, 4800), (1, 6400)]
    assert set(data.batches[0]) == {"input_values"}
    assert torch.isfinite(model(**data.batches[0]).logits).all()
    _write(tmp_path / "short.wav", _tone(0.05, 16_000), 16_000)
    with pytest.raises(CalibrationError, match=r"short\.wav is shorter than 0\.1 s"):
        load_calibration(f"audio:{tmp_path}", directory=None, model=model, processor=extractor)


@pytest.mark.parametrize(("width", "tolerance"), [(1, 2e-2), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
def test_wav_files_of_every_width(tmp_path, monkeypatch, width, tolerance):
    monkeypatch.setattr(media, "_soundfile", lambda: None)
    sound = _tone(0.1, 8_000)
    stereo = np.stack((sound, np.zeros_like(sound)), axis=1).reshape(-1)
    _write(tmp_path / "mono.wav", sound, 8_000, width)
    _write(tmp_path / "stereo.wav", stereo, 8_000, width, channels=2)
    for name, factor in (("mono", 1.0), ("stereo", 0.5)):
        values, rate = read_sound(tmp_path / f"{name}.wav")
        assert rate == 8_000 and values.dtype == np.float32
        np.testing.assert_allclose(values, factor * sound, atol=tolerance)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    with pytest.raises(CalibrationError, match=r"broken\.wav cannot be read"):
        read_sound(tmp_path / "broken.wav")


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
def test_resampling_keeps_a_tone(rate):
    # 440 Hz for a whole second: whole periods, so that the ends meet
    out = resample(_tone(1.0, rate).astype(np.float32), rate, 16_000)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, _tone(1.0, 16_000), atol=1e-4)
