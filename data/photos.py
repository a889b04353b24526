"""Synthetic photographs for benchmarks: JPEGs with a photo's spectrum and edges, and captions of typical length."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from .write import Sample, write_shard

ASPECTS = (1.0, 4 / 3, 3 / 4, 3 / 2)
"""Width over height; all equally frequent."""
QUALITY = 85
TEXTURE = 2048
"""Side in pixels of the texture that all images are cropped from."""
WORDS = (
    *("a", "the", "of", "with", "on", "in", "and", "near", "under", "behind", "small", "large", "red", "green", "blue"),
    *("dark", "bright", "old", "wooden", "quiet", "busy", "street", "river", "field", "window", "table", "garden"),
    *("mountain", "bridge", "market", "dog", "horse", "bicycle", "child", "lamp", "flower", "cloud", "shadow", "light"),
)


def make_photos(folder: Path, samples: int, shards: int, sides: tuple[int, int], seed: int = 0) -> str:
    """Write `samples` images in `shards` shards, deterministically; returns a pattern that matches all shards.

    sides: minimum and maximum of the shorter side in pixels, drawn uniformly.
    """
    rng = np.random.default_rng(seed)
    texture = _texture(rng, max(TEXTURE, 2 * sides[1]))
    for shard in range(shards):
        numbers = range(shard * samples // shards, (shard + 1) * samples // shards)
        write_shard(folder / f"photos-{shard:05d}.tar", _images(rng, texture, numbers, sides))
    return str(folder / "photos-*.tar")


def _images(
    rng: np.random.Generator, texture: np.ndarray, numbers: range, sides: tuple[int, int]
) -> Iterator[tuple[str, Sample]]:
    for number in numbers:
        short, aspect = int(rng.integers(sides[0], sides[1] + 1)), float(rng.choice(ASPECTS))
        width, height = round(short * max(aspect, 1)), round(short * max(1 / aspect, 1))
        file = io.BytesIO()
        _image(rng, texture, width, height).save(file, "JPEG", quality=QUALITY)
        caption = " ".join(rng.choice(WORDS, int(rng.integers(20, 101))))
        yield f"photo-{number:06d}", {"jpg": file.getvalue(), "txt": caption.encode()}


def _image(rng: np.random.Generator, texture: np.ndarray, width: int, height: int) -> Image.Image:
    top, left = (int(rng.integers(0, len(texture) - side + 1)) for side in (height, width))
    pixels = texture[top : top + height, left : left + width, :: int(rng.choice((1, -1)))].copy()
    for _ in range(16):  # objects with edges, lit differently
        radius = int(rng.uniform(0.03, 0.2) * min(width, height))
        y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
        top, left = (int(rng.integers(0, side - 2 * radius)) for side in (height, width))
        part = pixels[top : top + 2 * radius + 1, left : left + 2 * radius + 1]
        inside = y**2 + x**2 <= radius**2
        part[inside] = part[inside] // 2 + rng.integers(0, 128, 3, dtype=np.uint8)
    return Image.fromarray(pixels)


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """RGB [side, side, 3] with a photo-like spectrum: amplitudes fall with frequency, those of colour faster."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = frequency[0, 1]

    def field(power: float) -> np.ndarray:
        values = np.fft.irfft2(frequency**-power * np.exp(2j * np.pi * rng.random(frequency.shape)), (side, side))
        return (values - values.mean()) / values.std()

    bands = [128 + 45 * field(1.2), 128 + 14 * field(1.6), 128 + 14 * field(1.6)]
    channels = [Image.fromarray(band.clip(0, 255).astype(np.uint8)) for band in bands]
    return np.asarray(Image.merge("YCbCr", channels).convert("RGB"))
