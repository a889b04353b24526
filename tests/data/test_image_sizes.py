"""The index has the size of every image as the decoder decodes it; indexes of version 1, without sizes, are read on."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from bifrost.data import open_dataset, write_shard
from bifrost.data.index import load_index
from bifrost.data.make_catalogue import make_catalogues
from bifrost.data.transforms import image_size
from bifrost.data.write import index_shards, verify
from old_index import as_version_1

ORIENTATION = 0x0112


def drawing(kind: str, orientation: int = 1, size: tuple[int, int] = (40, 24)) -> bytes:
    exif, file = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = orientation
    Image.new("RGB", size, "red").save(file, kind, exif=exif)
    return file.getvalue()


def rotated_behind_pixels(orientation: int) -> bytes:
    """A PNG whose EXIF follows its pixels, as the specification allows."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = orientation
    Image.new("RGB", (40, 24)).save(file, "PNG")
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    check = zlib.crc32(b"eXIf" + content)
    chunk = struct.pack(">I", len(content)) + b"eXIf" + content + struct.pack(">I", check)
    return file.getvalue()[:-12] + chunk + file.getvalue()[-12:]


def upright_sides(data: bytes) -> tuple[int, int]:
    """Width and height that Pillow alone gives for the upright image."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return ImageOps.exif_transpose(image).size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_upright_image(orientation):
    for data in (*(drawing(kind, orientation) for kind in ("JPEG", "PNG", "WEBP")), rotated_behind_pixels(orientation)):
        assert image_size(data) == upright_sides(data) == ((24, 40) if orientation > 4 else (40, 24))


def test_size_of_a_png_with_damaged_text():
    data = drawing("PNG")
    bad = struct.pack(">I", 5) + b"iCCP" + b"a\0\0zz" + struct.pack(">I", 0)
    damaged = data[:33] + bad + data[33:]
    with pytest.raises((OSError, SyntaxError, ValueError)):
        Image.open(io.BytesIO(damaged)).load()
    assert image_size(damaged) == (40, 24)


def test_no_size_of_what_is_not_decoded():
    too_large = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(too_large, "PNG")
    for data in (b"", b"<html>", drawing("JPEG")[:8], too_large.getvalue(), drawing("GIF")):
        assert image_size(data) is None


def test_index_has_the_sizes(tmp_path, make_image):
    sizes = [(24, 20), (7, 90), (300, 5)]
    samples = [(f"k{n}", {"png": make_image(n, size=size), "txt": b"a"}) for n, size in enumerate(sizes)]
    samples += [("turned", {"jpg": drawing("JPEG", 6), "txt": b"a"}), ("bad", {"webp": b"RIFF", "txt": b"a"})]
    write_shard(tmp_path / "s.tar", samples)
    assert load_index(str(tmp_path / "s.tar")).image_sizes == [*sizes, (24, 40), None]


def test_indexes_without_sizes_are_read_on(make_shards, tmp_path):
    before = make_shards([4, 3])
    entries = [before.entry(shard, 1) for shard in (0, 1)]
    as_version_1(tmp_path / "s-00000.tar")
    dataset = open_dataset(str(tmp_path))
    assert dataset.fingerprint == before.fingerprint
    assert [dataset.entry(shard, 1) for shard in (0, 1)] == entries
    assert np.array_equal(np.frombuffer(dataset.read(0, 1).image, "u1"), np.frombuffer(before.read(0, 1).image, "u1"))
    assert load_index(dataset.shards[0]).image_sizes is None
    assert verify(str(tmp_path)) == []
    index_shards(str(tmp_path))
    assert load_index(dataset.shards[0]).image_sizes == [(24, 20)] * 4


@pytest.mark.parametrize("indexed_again", [True, False])
def test_catalogues_hold_both_versions(make_shards, tmp_path, indexed_again):
    before = make_shards([4, 3])
    as_version_1(tmp_path / "s-00001.tar")
    make_catalogues(str(tmp_path))
    if indexed_again:  # an index written again is that of the same shard
        index_shards(str(tmp_path))
    dataset = open_dataset(str(tmp_path))
    assert dataset.fingerprint == before.fingerprint
    assert [dataset.read(shard, 0).key for shard in (0, 1)] == ["key-0000", "key-0004"]
    assert verify(str(tmp_path)) == []


def test_an_altered_size_is_found(make_shards, tmp_path):
    make_shards([2])
    index = tmp_path / "s-00000.index.jsonl"
    index.write_text(index.read_text().replace("[24, 20]", "[20, 24]"))
    assert "altered index" in verify(str(tmp_path))[0]
