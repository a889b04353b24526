"""The readers of other libraries that `bifrost bench data` measures deliver the samples of the shards, from files and
over HTTP, and those that are not installed are named."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bifrost.data import bench, open_dataset
from bifrost.data.photos import make_photos
from bifrost.trainer.bench import data, other_readers, range_server
from bifrost.trainer.versions import version

READERS = [reader.name for reader in other_readers.OTHER_READERS]


@pytest.fixture(scope="module")
def stored(shards: Path) -> dict[str, torch.Tensor]:
    """Caption -> image uint8 [3, 64, 64] of every sample, by tarfile and Pillow."""
    members: dict[str, bytes] = {}
    for shard in sorted(shards.glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    images = {name: np.array(Image.open(io.BytesIO(data))) for name, data in members.items() if name.endswith(".png")}
    return {
        members[name.replace(".png", ".txt")].decode(): torch.from_numpy(image).permute(2, 0, 1)
        for name, image in images.items()
    }


def reader(name: str) -> other_readers.OtherReader:
    if version(name) is None:
        pytest.skip(f"optional package {name} is not installed")
    return next(each for each in other_readers.OTHER_READERS if each.name == name)


def job(spec: str, workers: int = 1) -> bench.Job:
    return bench.Job(open_dataset(spec), bench.stack, (64,), micro_batch=5, workers=workers)


@contextmanager
def served(work: bench.Job, folder: Path) -> Iterator[None]:
    """A server of the shards and of the converted samples in `folder`."""
    with (
        range_server.served(work.dataset.shards, 0.001, {other_readers.BUCKET: folder}) as server,
        other_readers.s3_environment(server.endpoint, folder),
    ):
        work.urls = server.urls
        yield


def delivered(batches: Iterator[dict], epochs: int = 12) -> dict[str, torch.Tensor]:
    """Caption -> image of up to `epochs` epochs, until all 60 samples have been read."""
    found: dict[str, torch.Tensor] = {}
    for batch in islice(batches, epochs * 12):
        assert batch["images"].shape == (5, 3, 64, 64)
        found |= dict(zip(batch["captions"], batch["images"], strict=True))
        if len(found) == 60:
            break
    batches.close()
    return found


@pytest.mark.multi
@pytest.mark.parametrize("http", [False, True], ids=["files", "http"])
@pytest.mark.parametrize("name", READERS)
def test_readers_deliver_the_samples_of_the_shards(
    name: str, http: bool, shards: Path, stored: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Decoded by Pillow and by our decoder, which at the images' own size are the same."""
    each, work = reader(name), job(f"{shards}/train-*.tar", workers=2 if http else 1)
    each.prepare(work, tmp_path)
    with served(work, tmp_path) if http else nullcontext():
        for own_decoder in (False, True):
            found = delivered(each.batches(work, tmp_path, http, own_decoder))
            assert found.keys() == stored.keys()
            assert all(torch.equal(image, stored[caption]) for caption, image in found.items())


@pytest.mark.multi
@pytest.mark.parametrize("name", ["mosaicml-streaming", "litdata"])
def test_nothing_is_read_from_the_cache_of_an_earlier_round(name: str, shards: Path, tmp_path: Path) -> None:
    """The second round's samples have the URL of the first one's, and are others."""
    each, rounds = reader(name), []
    others = Path(make_photos(tmp_path / "photos", 60, 4, (64, 64))).parent
    for number, work in enumerate((job(f"{shards}/train-*.tar"), job(f"{others}/*.tar"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        each.prepare(work, folder)
        assert 4 <= len(list((folder / name).iterdir())) <= 6, "an index, and about as many files as shards"
        with served(work, folder):
            rounds.append(delivered(each.batches(work, folder, served=True)))
    assert [len(found) for found in rounds] == [60, 60] and rounds[0].keys().isdisjoint(rounds[1])


def test_missing_readers_are_named_with_their_installation(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(other_readers, "version", lambda name: None)
    assert data._prepared(job(f"{shards}/train-*.tar"), tmp_path) == {}
    printed = capsys.readouterr().out
    assert 'litdata is not installed and left out: pip install "bifrost-train[bench]"\n' in printed
    assert "mosaicml-streaming is not installed and left out: pip install --no-deps mosaicml-streaming" in printed
    assert printed.count("\n") == len(READERS)


def test_the_environment_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "mine")
    before = dict(os.environ)
    with other_readers.s3_environment("http://127.0.0.1:1", tmp_path):
        assert os.environ["AWS_ENDPOINT_URL"] == "http://127.0.0.1:1" and "AWS_PROFILE" not in os.environ
    assert dict(os.environ) == before
