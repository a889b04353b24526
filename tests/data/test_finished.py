"""An ingest run again over its finished output: what is damaged is made again, what is not its own stays as it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bifrost.data import DataError, index_shards, verify, write_shard
from bifrost.data.ingest import ingest

SHARD, INDEX, REPORT = "train-00001.tar", "train-00001.index.jsonl", ".ingest/00001.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_image) -> tuple[Path, Path]:
    """A source of six images, and the finished output of three shards."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "src").mkdir()
    for number in range(6):
        (folder / f"src/{number}.png").write_bytes(make_image(number))
        (folder / f"src/{number}.txt").write_text(f"number {number}")
    assert ingest(folder / "src", folder / "out", samples_per_shard=2, processes=1) == (3, 6, 0)
    return folder / "src", folder / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def unlink(*names: str) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        for name in names:
            (out / name).unlink()

    return damage


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda out: os.truncate(out / name, size)


def without_sizes(out: Path) -> None:
    """Leave the report as an earlier version wrote it."""
    report = json.loads((out / REPORT).read_text())
    kept = {"unused_captions": 0, **{name: report[name] for name in ("samples", "rejected")}}
    (out / REPORT).write_text(json.dumps(kept))
    os.truncate(out / SHARD, 5000)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate(SHARD, 5000), "it has 5,000 bytes instead of 10,240"),
        (truncate(SHARD, 0), "it has 0 bytes instead of 10,240"),
        (unlink(SHARD), "it is missing"),
        (unlink(SHARD, INDEX), "it is missing"),
        (unlink(INDEX), "its index is missing"),
        (truncate(INDEX, 0), "its index is damaged"),
        (truncate(INDEX, 300), "its index is damaged"),
        (without_sizes, "it has 5,000 bytes instead of 10,240"),
        (unlink(REPORT), ""),
        (truncate(REPORT, 10), ""),
    ],
)
def test_a_damaged_shard_is_made_again(finished, tmp_path, capfd, damage, reason) -> None:
    src, whole = finished
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    damage(out)
    assert ingest(src, out, samples_per_shard=2, processes=1) == (3, 6, 0)
    assert contents(out) == contents(whole)
    assert verify(str(out)) == []
    lines = capfd.readouterr().err.splitlines()
    assert lines == ([f"{out / SHARD}: made again, since {reason}"] if reason else [])


@pytest.mark.parametrize("indexed", [True, False])
def test_another_shard_in_its_place_is_refused_and_kept(finished, tmp_path, make_image, indexed) -> None:
    src, whole = finished
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    count = 2 if indexed else 9  # without an index, only its size shows that it is another one
    write_shard(out / SHARD, [(f"mine{i}", {"png": make_image(50 + i), "txt": b"mine"}) for i in range(count)])
    if not indexed:
        (out / INDEX).unlink()
    before = contents(out)
    with pytest.raises(DataError, match=rf"{SHARD}: not the shard that this ingest made there; move it"):
        ingest(src, out, samples_per_shard=2, processes=1)
    assert contents(out) == before


def test_a_smaller_shard_that_was_indexed_is_refused(finished, tmp_path) -> None:
    src, whole = finished
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    write_shard(out / "other.tar", [])
    os.replace(out / "other.tar", out / SHARD)
    (out / INDEX).unlink()
    index_shards(str(out / SHARD))
    with pytest.raises(DataError, match="not the shard that this ingest made there"):
        ingest(src, out, samples_per_shard=2, processes=1)


def test_a_damaged_journal_is_refused(finished, tmp_path) -> None:
    src, whole = finished
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    os.truncate(out / ".ingest/journal.json", 20)
    with pytest.raises(DataError, match=r"journal\.json: damaged; name a new folder"):
        ingest(src, out, samples_per_shard=2, processes=1)
