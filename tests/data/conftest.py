from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from bifrost.data import open_dataset, write_shard


def _make_image(seed: int, kind: str = "png", size: tuple[int, int] = (24, 20)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"jpg": "JPEG"}.get(kind, kind.upper()))
    return file.getvalue()


@pytest.fixture(scope="session")
def make_image():
    """(seed, kind, size) -> bytes of a noise image."""
    return _make_image


@pytest.fixture
def make_shards(tmp_path):
    """Write shards with the given sample counts; samples numbered in `broken` have a truncated image."""

    def make(counts: list[int], broken: set[int] = frozenset(), folder=tmp_path):
        number = 0
        for shard, count in enumerate(counts):
            samples = []
            for _ in range(count):
                image = _make_image(number)
                image = image[: len(image) // 2] if number in broken else image
                samples.append((f"key-{number:04d}", {"png": image, "txt": f"caption {number}".encode()}))
                number += 1
            write_shard(folder / f"s-{shard:05d}.tar", samples)
        return open_dataset(str(folder / "s-*.tar"))

    return make
