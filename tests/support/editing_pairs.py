"""A few editing pairs, in shards."""

from __future__ import annotations

from pathlib import Path

import small_shards
from bifrost.data import write_shard

SOURCE = 500
"""Number of the source image's pattern, above that of the image."""


def save(folder: Path, shards: int = 2) -> Path:
    """Write 15 pairs to each shard, edit-00000.tar …"""
    for shard in range(shards):
        numbers = range(shard * 15, shard * 15 + 15)
        write_shard(folder / f"edit-{shard:05d}.tar", ((f"edit-{number:03d}", pair(number)) for number in numbers))
    return folder


def pair(number: int) -> dict[str, bytes]:
    return {
        "png": small_shards.pattern(100 + number),
        "source.png": small_shards.pattern(SOURCE + number),
        "txt": f"make it pattern {number}".encode(),
    }
