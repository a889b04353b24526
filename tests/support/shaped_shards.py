"""Image-caption pairs in three shapes, in shards."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from bifrost.data import write_shard

SIZES = [(64, 64), (96, 64), (64, 96), (100, 66), (70, 64)]
"""Width and height of the images, in turn."""


def save(folder: Path, shards: int = 4, first: int = 0) -> Path:
    """Write 13 pairs to each of some shards, train-00000.tar …; image number 3 is damaged, 5 is too small to be used.
    first: number of the first pair, so that data sets differ."""
    for shard in range(shards):
        samples = []
        for number in range(first + 13 * shard, first + 13 * shard + 13):
            image = drawing(number, (8, 8) if number == first + 5 else SIZES[number % 5])
            image = image[: len(image) // 2] if number == first + 3 else image
            samples.append((f"shape-{number:03d}", {"png": image, "txt": f"a red apple {number}".encode()}))
        write_shard(folder / f"train-{shard:05d}.tar", samples)
    return folder


def drawing(number: int, size: tuple[int, int]) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()
