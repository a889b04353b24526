"""Failing local file systems, such as network mounts: faults in every system call of a listing."""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest

from bifrost.data import DataError, DataLost, index_shards, parquet, retry
from bifrost.data.ingest import ingest
from bifrost.data.processes import sole_owner
from bifrost.data.shard_list import expand
from bifrost.data.sources import list_source

ROWS = [{"file": f"{number}.png", "text": f"text {number}"} for number in range(8)]


class Faults:
    """Makes system calls on paths below a folder fail with `code`: the first `times` of each call on each path whose
    name is in `names` (None: any)."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.code, self.times, self.names = str(root), errno.ESTALE, 0, None
        self.fired: Counter[tuple[str, str]] = Counter()
        for module, name in [(os, "stat"), (os, "lstat"), (os, "listdir"), (os, "scandir"), (os, "readlink")]:
            monkeypatch.setattr(module, name, self.failing(name, getattr(module, name)))
        for module in (io, builtins):
            monkeypatch.setattr(module, "open", self.failing("open", open))
        monkeypatch.setattr(os, "pread", self.reading(os.pread))
        monkeypatch.setattr(parquet, "ParquetFile", self.parquet_file(parquet.ParquetFile))

    def may_fail(self, call: str, path: str) -> None:
        named = path.startswith(self.root) and (self.names is None or os.path.basename(path) in self.names)
        if named and self.fired[call, path] < self.times:
            self.fired[call, path] += 1
            raise OSError(self.code, os.strerror(self.code), path)

    def failing(self, name: str, call: Callable) -> Callable:
        def asked(path=".", *arguments, **options):
            if isinstance(path, (str, Path)):
                self.may_fail(name, str(path))
            return call(path, *arguments, **options)

        return asked

    def reading(self, pread: Callable) -> Callable:
        def asked(handle: int, size: int, offset: int) -> bytes:
            self.may_fail(f"pread {offset}", os.path.realpath(f"/proc/self/fd/{handle}"))
            return pread(handle, size, offset)

        return asked

    def parquet_file(self, kind: type) -> Callable:
        faults = self

        class File(kind):  # makes its system calls in C++
            def read_row_group(self, group: int, **options):
                faults.may_fail(f"row group {group}", self.table)
                return super().read_row_group(group, **options)

        def opened(table: Path) -> File:
            self.may_fail("open", str(table))
            file = File(table)
            file.table = str(table)
            return file

        return opened


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:
    monkeypatch.setattr(retry, "_sleep", lambda seconds: None)
    return Faults(tmp_path, monkeypatch)


@pytest.fixture
def sources(tmp_path: Path, make_image, make_shards) -> dict[str, str]:
    """One source of each kind, each with an item that is set aside."""
    images = tmp_path / "images"
    for folder in (images, images / "below", tmp_path / "elsewhere"):
        folder.mkdir()
        for number in range(3):
            (folder / f"{folder.name}{number}.png").write_bytes(make_image(number))
            (folder / f"{folder.name}{number}.txt").write_text("x")
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    (images / "unmounted").symlink_to(tmp_path / "disk")
    (images / "mute.png").write_bytes(make_image(1))
    (tmp_path / "tars").mkdir()
    make_shards([5] * 8, folder=tmp_path / "tars")
    table = tmp_path / "table"
    table.mkdir()
    for row in ROWS[:-1]:
        (table / row["file"]).write_bytes(make_image(1))
    (table / "metadata.csv").write_text("file,text\n" + "".join(f"{row['file']},{row['text']}\n" for row in ROWS))
    (table / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rows = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(rows, table / "b-0.parquet", row_group_size=1)
    pyarrow.parquet.write_table(rows.slice(0, 1), table / "b-1.parquet")
    return {
        "folder": str(images),
        "folder of tars": str(tmp_path / "tars"),
        "tars": str(tmp_path / "tars/s-*.tar"),
        "folder with a table": str(table),
        "lines": str(table / "a.jsonl"),
        "row groups": str(table / "b-*.parquet"),
    }


@pytest.mark.parametrize("kind", ["folder", "folder of tars", "tars", "folder with a table", "lines", "row groups"])
def test_each_call_is_retried(sources, faults, kind) -> None:
    """Together far more failures than one time limit allows: nothing is set aside, skipped or reordered."""
    sound = list_source(sources[kind])
    assert len(sound.candidates) >= 7
    faults.times = 2
    assert list_source(sources[kind]) == sound
    assert sum(faults.fired.values()) >= 20


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("folder", "images"),
        ("folder", "below"),
        ("folder", "linked"),
        ("folder of tars", "s-00003.tar"),
        ("tars", "tars"),
        ("folder with a table", "metadata.csv"),
        ("lines", "a.jsonl"),
        ("row groups", "table"),
    ],
)
def test_unavailable_storage_is_not_a_missing_file(sources, faults, kind, name, code) -> None:
    faults.times, faults.names, faults.code = 1000, {name}, code
    with pytest.raises(DataLost, match=f"/{name}: {os.strerror(code)}; check the storage"):
        list_source(sources[kind])


@pytest.mark.parametrize(
    ("kind", "name"),
    [("folder", "images"), ("tars", "tars"), ("lines", "a.jsonl"), ("row groups", "table")],
)
def test_unreadable_source_is_not_missing(sources, faults, kind, name) -> None:
    faults.times, faults.names, faults.code = 1000, {name}, errno.EACCES
    with pytest.raises(DataError, match=f"/{name}: Permission denied; check ") as caught:
        list_source(sources[kind])
    assert not isinstance(caught.value, DataLost)


def test_unreadable_part_is_set_aside(sources, faults) -> None:
    faults.times, faults.names, faults.code = 1000, {"below", "linked", "images0.png"}, errno.EACCES
    source = list_source(sources["folder"])
    assert [candidate.key for candidate in source.candidates] == ["images1", "images2"]
    assert {key: reason for key, reason in source.rejected if key != "unmounted"} == {
        "below": "the folder cannot be read: Permission denied",
        "linked": "Permission denied",
        "images0": "Permission denied",
        "mute": "no caption: mute.txt is missing",
    }


@pytest.mark.parametrize("spec", ["tars", "folder of tars"])
def test_shards_in_a_failing_folder(sources, faults, spec) -> None:
    """For training as well as for ingest."""
    sound = expand(sources[spec])
    faults.times = 2
    assert expand(sources[spec]) == sound and len(sound) == 8
    faults.times, faults.names = 1000, {"tars"}
    for work in (expand, index_shards):
        with pytest.raises(DataLost, match="/tars: Stale file handle; check the storage"):
            work(sources[spec])


@pytest.mark.parametrize("name", [".lock", "x.tar.tmp-1", "out"])
def test_a_folder_is_locked_despite_faults(faults, tmp_path, monkeypatch, name) -> None:
    out = tmp_path / "out"
    for call in ("mkdir", "unlink"):
        monkeypatch.setattr(os, call, faults.failing(call, getattr(os, call)))
    monkeypatch.setattr(fcntl, "flock", lambda file, flags: faults.may_fail("flock", file.name))
    faults.times, faults.names = 2, {name}
    for _ in range(2):
        with sole_owner(out):
            (out / "x.tar.tmp-1").touch()
    assert len(faults.fired) >= 1
    faults.times = 1000
    with pytest.raises(DataLost, match="/out: Stale file handle; check the storage"), sole_owner(out):
        pass


def test_finished_ingest_is_recognized_despite_faults(sources, faults, tmp_path) -> None:
    out = tmp_path / "out"
    made = ingest(sources["folder"], out, samples_per_shard=4, processes=1)
    before = {path: path.stat().st_mtime_ns for path in out.glob("train-*")}
    faults.times, faults.names = 2, {"journal.json", "00000.json", "00001.json", "train-00000.tar", "images"}
    assert ingest(sources["folder"], out, samples_per_shard=4, processes=1) == made
    assert {path: path.stat().st_mtime_ns for path in out.glob("train-*")} == before
    assert len(faults.fired) >= 8
