"""Images and sounds that are made up, the same for every seed, for those who give no folder of real ones."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

from hf_quant.errors import DependencyError

_SIDE = 224
_RATE = 16_000


def images(folder: Path, count: int, seed: int) -> str:
    """Write ``count`` PNG files: noise at scales from a pixel to the whole picture, with a few plain shapes in it.

    Returns:
        What they are, in words.

    Raises:
        DependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise DependencyError(
            "images need the package `pillow`, which is not installed.", "pip install pillow"
        ) from error
    for number in range(count):
        generator = np.random.default_rng((seed, number))
        picture = np.zeros((_SIDE, _SIDE, 3))
        for cells in (2, 7, 28, _SIDE):
            coarse = generator.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
            picture += np.asarray(Image.fromarray(coarse).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)) / 4
        image = Image.fromarray(picture.astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for shape in range(int(generator.integers(1, 5))):
            left, top = generator.integers(0, _SIDE // 2, 2).tolist()
            width, height = generator.integers(20, _SIDE // 2, 2).tolist()
            colour = tuple(generator.integers(0, 256, 3).tolist())
            (draw.ellipse if shape % 2 else draw.rectangle)((left, top, left + width, top + height), fill=colour)
        image.save(folder / f"{number:04}.png")
    return f"{count} images of noise and plain shapes"


def sounds(folder: Path, count: int, seed: int) -> str:
    """Write ``count`` wav files of 2 to 6 s: harmonic tones that glide and swell, in noise; returns what they are."""
    for number in range(count):
        generator = np.random.default_rng((seed, number))
        time = np.arange(int(_RATE * generator.uniform(2, 6))) / _RATE
        sound = 0.02 * generator.standard_normal(len(time))
        for _ in range(int(generator.integers(1, 4))):
            pitch, glide, swell = generator.uniform(90, 300), generator.uniform(-40, 40), generator.uniform(1, 5)
            phase = 2 * np.pi * (pitch * time + glide * time**2 / 2)
            envelope = 0.5 + 0.5 * np.sin(2 * np.pi * swell * time)
            sound += sum(envelope * np.sin(k * phase) / k for k in range(1, 6)) / 8
        with wave.open(str(folder / f"{number:04}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(_RATE)
            file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
    return f"{count} sounds of gliding tones in noise"
