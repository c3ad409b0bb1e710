"""Folders of images and of sound to the inputs of vision and speech models, through the model's own processor."""

from __future__ import annotations

import importlib
import random
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_quant.errors import CalibrationError, DependencyError

IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
SOUNDS = frozenset({".wav"})
_MORE_SOUNDS = frozenset({".aiff", ".flac", ".mp3", ".ogg"})  # with the package soundfile
_LONGEST_SECONDS = 30.0
_SHORTEST_SECONDS = 0.1

Floats = NDArray[np.float32]


def pick_files(folder: Path, suffixes: frozenset[str], count: int, seed: int, what: str) -> list[Path]:
    """At most ``count`` files of a folder (with its subfolders), chosen by ``seed``, in the order of their names.

    Raises:
        CalibrationError: no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise CalibrationError(f"the folder of {what} {str(folder)!r} does not exist.", "give an existing folder.")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not found:
        raise CalibrationError(
            f"the folder {str(folder)!r} has no {what}.", f"give a folder of {', '.join(sorted(suffixes))} files."
        )
    return sorted(random.Random(seed).sample(found, min(count, len(found))))


def image_samples(
    folder: Path, processor: Any, *, samples: int, seed: int, progress: Callable[[str, int, int], None] | None = None
) -> list[dict[str, Tensor]]:
    """One sample per image: what the image processor makes of it (``pixel_values`` and what goes with them).

    Raises:
        DependencyError: Pillow is not installed.
        CalibrationError: no images, or one that cannot be read.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise DependencyError(
            "images need the package `pillow`, which is not installed.", "pip install pillow"
        ) from error
    rows = []
    files = pick_files(folder, IMAGES, samples, seed, "images")
    for number, file in enumerate(files, 1):
        try:
            with Image.open(file) as image:
                rgb = image.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise CalibrationError(f"the image {file} cannot be read: {error}.", "remove or repair it.") from error
        rows.append(_tensors(processor(images=rgb, return_tensors="pt")))
        if progress is not None:
            progress("read images", number, len(files))
    return rows


def sound_samples(
    folder: Path, processor: Any, *, samples: int, seed: int, progress: Callable[[str, int, int], None] | None = None
) -> list[dict[str, Tensor]]:
    """One sample per clip (its first 30 s): what the feature extractor makes of it.

    Clips are mixed to one channel and resampled to the extractor's rate.

    Raises:
        CalibrationError: no clips, or one that cannot be read or is shorter than 0.1 s.
    """
    suffixes = SOUNDS | _MORE_SOUNDS if _soundfile() is not None else SOUNDS
    rows = []
    files = pick_files(folder, suffixes, samples, seed, "sound files")
    rate = int(getattr(processor, "sampling_rate", 16_000))
    for number, file in enumerate(files, 1):
        wanted = resample(*read_sound(file), rate)[: int(_LONGEST_SECONDS * rate)]
        if len(wanted) < _SHORTEST_SECONDS * rate:
            raise CalibrationError(f"the clip {file} is shorter than {_SHORTEST_SECONDS} s.", "remove it.")
        made = _tensors(processor(wanted, sampling_rate=rate, return_tensors="pt"))
        # One clip has nothing to pad; a mask of ones only stops clips of equal length from being recognised as such.
        rows.append({name: value for name, value in made.items() if name != "attention_mask" or not bool(value.all())})
        if progress is not None:
            progress("read sounds", number, len(files))
    return rows


def read_sound(file: Path) -> tuple[Floats, int]:
    """One channel, float32 in -1 .. 1, and its rate; with soundfile if it is installed, else PCM wav files only."""
    soundfile = _soundfile()
    if soundfile is not None:
        try:
            data, rate = soundfile.read(str(file), dtype="float32", always_2d=True)
        except (OSError, RuntimeError) as error:
            raise CalibrationError(f"the clip {file} cannot be read: {error}.", "remove or repair it.") from error
        return np.asarray(data, dtype=np.float32).mean(axis=1, dtype=np.float32), int(rate)
    try:
        with wave.open(str(file), "rb") as opened:
            width, channels, rate = opened.getsampwidth(), opened.getnchannels(), opened.getframerate()
            raw = opened.readframes(opened.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise CalibrationError(
            f"the clip {file} cannot be read: {error}.", "give PCM wav files, or install the package soundfile."
        ) from error
    raw = raw[: len(raw) // (width * channels) * width * channels]
    if width == 1:  # the only unsigned one
        values = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    else:
        # Left-aligned in 32 bits, so that 16, 24 and 32 bits are one case.
        wide = np.zeros((len(raw) // width, 4), np.uint8)
        wide[:, 4 - width :] = np.frombuffer(raw, np.uint8).reshape(-1, width)
        values = wide.view("<i4").reshape(-1).astype(np.float32) / 2**31
    return values.reshape(-1, channels).mean(axis=1, dtype=np.float32), rate


def resample(sound: Floats, rate: int, wanted: int) -> Floats:
    """Change the sampling rate by cutting or extending the spectrum (exact for sounds below both Nyquist rates)."""
    if rate == wanted or not len(sound):
        return sound
    size = max(round(len(sound) * wanted / rate), 1)
    spectrum = np.fft.rfft(sound)
    kept = np.zeros(size // 2 + 1, dtype=spectrum.dtype)
    shared = min(len(spectrum), len(kept))
    kept[:shared] = spectrum[:shared]
    return (np.fft.irfft(kept, size) * (size / len(sound))).astype(np.float32)


def _tensors(made: Any) -> dict[str, Tensor]:
    return {name: value for name, value in dict(made).items() if isinstance(value, torch.Tensor)}


def _soundfile() -> Any:
    try:
        return importlib.import_module("soundfile")
    except (ImportError, OSError):  # OSError: the package is there, the library libsndfile is not
        return None
