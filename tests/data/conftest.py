from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import catalogued_folder
import object_store
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


@pytest.fixture(scope="module")
def s3():
    """The address of an object store."""
    with object_store.serving() as address:
        yield address


@pytest.fixture
def folder(make_shards, tmp_path) -> Path:
    """A folder of four shards, to be catalogued."""
    make_shards([5, 4, 3, 2], folder=tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture(params=catalogued_folder.KINDS)
def served(request, folder, monkeypatch):
    """`folder` on every kind of storage; see `catalogued_folder.serving`."""
    store = lambda: request.getfixturevalue("s3")  # noqa: E731
    with catalogued_folder.serving(request.param, folder, monkeypatch, store) as found:
        yield found
