"""Indexing and verifying on several ranks: what is written, counted and raised is that of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

import faulty_server
import object_store
import ranked
from bifrost.data import DataError, write_shard
from bifrost.data.files import content
from bifrost.data.index import index_path
from bifrost.data.make_catalogue import make_catalogues
from bifrost.data.write import Indexed, Verified, index_all, verify_all
from thread_ranks import in_ranks

RANKS = (2, 3, 5, 16)


@pytest.fixture
def shards(tmp_path, make_image) -> Path:
    """Eleven shards without indexes: one truncated, one without images, one with keys that are left out."""
    folder = tmp_path / "set"
    for number in range(11):
        samples = [(f"k{number}-{i}", {"png": make_image(number), "txt": b"x" * (i + 1)}) for i in range(number + 1)]
        if number == 5:
            samples = [("none", {"txt": b"no image"})]
        if number in (3, 8):
            samples += [("text", {"txt": b"no image"})]
        if number == 8:
            samples += [("other", {"input.png": make_image(0)})]
        write_shard(folder / f"s-{number:05d}.tar", samples)
    os.truncate(folder / "s-00002.tar", 900)
    for index in folder.glob("*.jsonl"):
        index.unlink()
    return folder


def outcome(work: Callable[[], Any]) -> Any:
    """The result, or the class and text of the DataError."""
    try:
        return work()
    except DataError as error:
        return type(error), str(error)


def written(own: str) -> dict[str, bytes]:
    fs, path = fsspec.url_to_fs(own)
    return {Path(name).name: fs.cat_file(name) for name in fs.find(path)}


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_ranks_do_what_one_process_does(kind, shards, tmp_path, monkeypatch, request) -> None:
    """With indexes next to the shards' place, in a folder of each number of ranks; the problems in the same order."""
    spec, base = str(shards), str(tmp_path / "own")
    if kind == "s3":
        address = request.getfixturevalue("s3")
        for name, value in object_store.environment(address).items():
            monkeypatch.setenv(name, value)
        object_store.fill(address, "bucket", shards)
        object_store.fill(address, "indexes", tmp_path / "nothing")
        spec, base = "s3://bucket", "s3://indexes/own"
    expected = index_all(f"{spec}/*.tar", index_dir=f"{base}-1")
    assert [Path(shard).name for shard, _ in expected.done] == [f"s-{n:05d}.tar" for n in range(11) if n not in (2, 5)]
    assert len(expected.problems) == 2 and "s-00002.tar: truncated" in expected.problems[0]
    assert expected.left_out == {"no image": 2, "no image: its image is .input.png": 1}
    checked = verify_all(f"{spec}/*.tar", f"{base}-1")
    assert checked.checked == 11 and len(checked.problems) == 2
    for ranks in RANKS:
        own = f"{base}-{ranks}"

        def index(rank, gather, own=own) -> Indexed:
            return index_all(f"{spec}/*.tar", False, own, rank, gather)

        def missing(rank, gather, own=own) -> list[str]:
            return [shard for shard, _ in index_all(f"{spec}/*.tar", True, own, rank, gather).done]

        def verify(rank, gather, own=own) -> Verified:
            return verify_all(f"{spec}/*.tar", own, rank, gather)

        assert in_ranks(index, ranks) == [expected] * ranks
        assert written(own) == written(f"{base}-1") and len(written(own)) == 9
        again = Verified(11, [problem.replace(f"{base}-1", own) for problem in checked.problems])
        assert in_ranks(verify, ranks) == [again] * ranks
        fs, path = fsspec.url_to_fs(index_path(f"{spec}/s-00007.tar", own))
        fs.rm(path)
        assert in_ranks(missing, ranks) == [[f"{spec}/s-00007.tar"]] * ranks


def test_ranks_find_what_one_process_finds(shards, make_image) -> None:
    """Damage of every kind, also of the catalogue of all shards."""
    for number in (2, 5):
        (shards / f"s-{number:05d}.tar").unlink()
    index_all(str(shards))
    make_catalogues(str(shards))
    (shards / "s-00010.index.jsonl").unlink()
    os.truncate(shards / "s-00004.tar", 2000)
    altered = shards / "s-00007.index.jsonl"
    altered.write_bytes(altered.read_bytes().replace(b"k7-3", b"k7-9"))
    write_shard(shards / "s-00011.tar", [("new", {"png": make_image(1), "txt": b"x"})])
    expected = verify_all(str(shards))
    assert [line.partition(": ")[0].rpartition("/")[2] for line in expected.problems] == [
        *("s-00004.tar", "s-00007.index.jsonl", "s-00010.tar", "shards.catalogue")
    ]
    for ranks in RANKS:
        assert in_ranks(lambda rank, gather: verify_all(str(shards), None, rank, gather), ranks) == [expected] * ranks


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([("403", "s-00006.tar"), ("500", "s-00003.tar")], "s-00003.tar"),
        ([("403", "s-00003.tar"), ("500", "s-00008.tar"), ("403", "s-00006.tar")], "s-00003.tar"),
    ],
)
def test_the_first_shards_error_is_raised_on_all(rules, words, shards, tmp_path, monkeypatch) -> None:
    """Whether a server refuses or does not answer decides the exit code."""
    monkeypatch.setattr("bifrost.data.retry.PATIENCE_S", 0.2)
    plan = faulty_server.Plan([faulty_server.Rule(fault, name, 10**6) for fault, name in rules])
    with faulty_server.serving(shards, plan) as (address, _):
        spec = f"{address}/s-{{00000..00010}}.tar"
        own = str(tmp_path / "own")
        expected = outcome(lambda: index_all(spec, False, own))
        assert words in expected[1]
        for ranks in RANKS[:3]:
            work = lambda rank, gather: outcome(lambda: index_all(spec, False, own, rank, gather))  # noqa: E731
            assert in_ranks(work, ranks) == [expected] * ranks
            work = lambda rank, gather: outcome(lambda: verify_all(spec, own, rank, gather))  # noqa: E731
            assert in_ranks(work, ranks) == [expected] * ranks


def command(environment: dict[str, str], arguments: list[str]) -> None:
    os.environ.update(environment)
    ranked.command(arguments)


@pytest.mark.slow
@pytest.mark.multi
def test_commands_on_processes(shards, tmp_path, s3) -> None:
    """On S3: output and exit codes of each number of ranks; only the first one prints."""
    object_store.fill(s3, "bucket", shards)
    object_store.fill(s3, "indexes", tmp_path / "nothing")
    seen = []
    for ranks in (1, 2, 4):
        own = f"s3://indexes/{ranks}"
        found = []
        for words in (
            ["index", "s3://bucket/*.tar"],
            ["verify", "s3://bucket/*.tar"],
            ["verify", "s3://bucket/*7.tar"],
        ):
            arguments = ["data", *words, "--index-dir", own]
            first, *others = ranked.run(command, ranks, object_store.environment(s3), arguments)
            assert all((each.code, each.out, each.err) == (first.code, "", "") for each in others)
            found.append((first.code, first.out.replace(own, ""), first.err.replace(own, "")))
        seen.append(found)
    assert seen[0] == seen[1] == seen[2]
    (indexed, out, err), (verified, lines, _), (whole, last, _) = seen[0]
    assert (indexed, verified, whole) == (2, 1, 0) and last == "1 shard checked, 0 with problems\n"
    assert "9 shards indexed: 57 samples, 57 of them with a caption (60 read, 3 of them without a sample)" in out
    assert err.startswith("error: s3://bucket/s-00002.tar: truncated") and err.count("\n") == 2
    assert lines.endswith("11 shards checked, 2 with problems\n")


def killed_at_its_second(folder: str) -> None:
    from bifrost.data import write

    before, done = write.save_index, []

    def save(*arguments: Any) -> None:
        before(*arguments)
        done.append(1)
        if os.environ["RANK"] == "1" and len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    write.save_index, write.THREADS = save, 1
    ranked.command(["data", "index", folder])


@pytest.mark.multi
def test_a_rank_killed_half_way(shards) -> None:
    """The rerun, on another number of ranks, indexes what is missing, and nothing twice."""
    for number in (2, 5):
        (shards / f"s-{number:05d}.tar").unlink()
    whole = shards.parent / "whole"
    shutil.copytree(shards, whole)
    index_all(str(whole))
    lost, killed = ranked.run(killed_at_its_second, 2, str(shards))
    assert killed.code == -signal.SIGKILL and lost.code == 1
    assert "lost the connection to another rank" in lost.err and "indexed" not in lost.out
    there = {file.name: file.stat().st_mtime_ns for file in shards.glob("*.jsonl")}
    assert 2 <= len(there) < 9
    first, *_ = ranked.bifrost(3, "data", "index", str(shards), "--only-missing")
    assert first.code == 0 and f"{9 - len(there)} shard" in first.out
    indexes = {file.name: content(str(file)) for file in whole.glob("*.jsonl")}
    assert {file.name: content(str(file)) for file in shards.glob("*.jsonl")} == indexes and len(indexes) == 9
    assert {name: (shards / name).stat().st_mtime_ns for name in there} == there
    assert json.loads(indexes["s-00000.index.jsonl"].split(b"\n")[0])["samples"] == 1


@pytest.mark.multi
def test_the_command_starts_its_ranks(shards, tmp_path) -> None:
    """`--ranks` passes all options on."""
    words = ["data", "index", str(shards), "--index-dir", f"{tmp_path}/own", "--only-missing", "--ranks", "2"]
    for read in ("9 shards indexed: 57 samples", "0 shards indexed"):
        ended = subprocess.run([sys.executable, "-m", "bifrost.trainer", *words], capture_output=True, text=True)
        assert ended.returncode == 2 and read in ended.stdout and ended.stderr.count("error: ") == 1, ended.stderr
    assert len(written(f"{tmp_path}/own")) == 9
