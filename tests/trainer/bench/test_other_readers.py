"""The readers of other libraries that `bifrost bench data` measures deliver the samples of the shards, from files and
over HTTP, and those that are not installed are named."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bifrost.data import bench, open_dataset
from bifrost.data.errors import DataError
from bifrost.trainer.bench import data, other_readers, range_server
from bifrost.trainer.versions import version

READERS = [reader.name for reader in other_readers.OTHER_READERS]
CONVERTED = ("mosaicml-streaming", "litdata")
"""Readers of files of their own, with the images in them."""


@pytest.fixture(scope="module")
def stored(shards: Path) -> dict[str, torch.Tensor]:
    """Caption -> image uint8 [3, 64, 64] of every sample, by tarfile and Pillow."""
    members: dict[str, bytes] = {}
    for shard in sorted(shards.glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    images = {name: np.array(Image.open(io.BytesIO(data))) for name, data in members.items() if name.endswith(".png")}
    return {
        members[name.replace(".png", ".txt")].decode().strip(): torch.from_numpy(image).permute(2, 0, 1)
        for name, image in images.items()
    }


def reader(name: str) -> other_readers.OtherReader:
    if version(name) is None:
        pytest.skip(f"optional package {name} is not installed")
    return next(each for each in other_readers.OTHER_READERS if each.name == name)


def job(spec: str, workers: int = 1) -> bench.Job:
    return bench.Job(open_dataset(spec), bench.stack, (64,), micro_batch=5, workers=workers)


def delivered(batches: Iterator[dict], epochs: int = 12) -> dict[str, torch.Tensor]:
    """Caption -> image of up to `epochs` epochs, until all 60 samples have been read."""
    found: dict[str, torch.Tensor] = {}
    for batch in islice(batches, epochs * 12):
        assert batch["images"].shape == (5, 3, 64, 64)
        found |= {caption.strip(): image for caption, image in zip(batch["captions"], batch["images"], strict=True)}
        if len(found) == 60:
            break
    batches.close()
    return found


def check(each: other_readers.OtherReader, work: bench.Job, folder: Path, stored: dict[str, torch.Tensor]) -> None:
    """Decoded by Pillow and by our decoder, which at the images' own size are the same."""
    for own_decoder in (False, True):
        found = delivered(each.batches(work, folder, own_decoder))
        assert found.keys() == stored.keys()
        assert all(torch.equal(image, stored[caption]) for caption, image in found.items())


@pytest.mark.multi
@pytest.mark.parametrize("name", READERS)
def test_readers_deliver_the_samples_of_the_shards(
    name: str, shards: Path, stored: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    each, work = reader(name), job(f"{shards}/train-*.tar")
    written = each.prepare(work, tmp_path)
    images = sum(map(len, work.images))
    assert name not in CONVERTED or images < written < 3 * images
    check(each, work, tmp_path, stored)


@pytest.mark.multi
def test_samples_over_http(shards: Path, stored: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """With two workers, and a second pipeline in the same process."""
    each, work = reader("datasets"), job(f"{shards}/train-*.tar", workers=2)
    each.prepare(work, tmp_path)
    with range_server.served(work.dataset.shards, 0.001) as urls:
        work.urls = urls
        check(each, work, tmp_path, stored)


def test_too_few_samples_for_a_micro_batch_are_an_error(shards: Path, tmp_path: Path) -> None:
    empty = other_readers.OtherReader("empty", lambda *arguments: [])
    with pytest.raises(DataError, match="empty: none of 1 worker has a micro-batch of 5 samples in an epoch of 60;"):
        next(empty.batches(job(f"{shards}/train-*.tar"), tmp_path))


def test_missing_readers_are_named_with_their_installation(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(other_readers, "version", lambda name: None)
    assert data._prepared(job(f"{shards}/train-*.tar"), tmp_path, http=False) == {}
    printed = capsys.readouterr().out
    assert "litdata is not installed and left out: pip install litdata\n" in printed
    assert "mosaicml-streaming is not installed and left out: pip install --no-deps mosaicml-streaming" in printed
    assert printed.count("\n") == len(READERS)


def test_readers_of_object_stores_are_left_out_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_readers, "version", lambda name: "1")
    found, reasons = other_readers.usable_readers(http=True)
    assert [each.name for each in found] == ["datasets"]
    assert reasons == [
        f"{name} reads object stores, no plain HTTP; left out with --latency" for name in READERS if name != "datasets"
    ]
    assert [each.name for each in other_readers.usable_readers(http=False)[0]] == READERS
