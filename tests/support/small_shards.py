"""A few image-caption pairs, in shards."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from bifrost.data import write_shard


def save(folder: Path) -> Path:
    """Write 60 pairs to four shards, train-00000.tar …"""
    for shard in range(4):
        samples = []
        for number in range(shard * 15, shard * 15 + 15):
            caption = f"pattern number {number} " + "of many colours " * (number % 3)
            samples.append((f"pattern-{number:03d}", {"png": pattern(number), "txt": caption.encode()}))
        write_shard(folder / f"train-{shard:05d}.tar", samples)
    return folder


def pattern(number: int) -> bytes:
    """A PNG of 64 x 64 pixels, another one for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()
