"""Ingest into an object store: the same objects as the files of a local one, and never a part of one."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import pytest
import s3fs

import faulty_server
import object_store
from bifrost.data import DataError, open_dataset, retry, verify
from bifrost.data.ingest import ingest
from bifrost.data.upload import staged
from faulty_server import FAULTS, Plan, Rule

OUT = "s3://bucket/sets/own"
OPTIONS = {"samples_per_shard": 4, "processes": 2}


@pytest.fixture
def plan(s3, tmp_path, monkeypatch) -> Iterator[Plan]:
    """Of the server in front of an empty bucket."""
    monkeypatch.setattr(retry, "_sleep", lambda seconds: time.sleep(min(seconds, 0.02)))
    (tmp_path / "empty").mkdir()
    object_store.fill(s3, "bucket", tmp_path / "empty")
    plan = Plan()
    with faulty_server.serving(s3, plan) as (address, _):
        for name, value in object_store.environment(address).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield plan
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def store(s3):
    """A client that no fault affects."""
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=s3, **keys)


def objects(store) -> dict[str, bytes]:
    """Those below OUT, by the rest of their names."""
    prefix = "sets/own/"
    found = store.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", ())
    return {
        each["Key"].removeprefix(prefix): store.get_object(Bucket="bucket", Key=each["Key"])["Body"].read()
        for each in found
    }


@pytest.fixture
def src(tmp_path, make_image) -> Path:
    """22 images, two of them without a caption, for five shards."""
    folder = tmp_path / "src"
    folder.mkdir()
    for number in range(22):
        (folder / f"{number:02d}.png").write_bytes(make_image(number))
        if number not in (5, 6):
            (folder / f"{number:02d}.txt").write_text(f"number {number}")
    return folder


@pytest.fixture
def expected(src, tmp_path) -> dict[str, bytes]:
    """The files of a local ingest."""
    out = tmp_path / "local"
    assert ingest(src, out, **OPTIONS) == (5, 20, 2)
    files = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_equal_to_a_local_ingest_under_faults(plan, store, src, expected) -> None:
    """While it runs, every object is a complete file, and each shard comes before its index, that before its report."""
    plan.chance, plan.faults = 0.4, tuple(each for each in FAULTS if each != "429")  # which asks for a second
    seen: list[dict[str, bytes]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.append(objects(store))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert ingest(src, OUT, **OPTIONS) == (5, 20, 2)
    finally:
        over.set()
        watcher.join()
    assert plan.fired.total() > 10 and len(seen) > 5
    for found in [*seen, objects(store)]:
        assert found.items() <= expected.items()
        for number in range(5):
            names = [f".ingest/{number:05d}.json", f"train-{number:05d}.index.jsonl", f"train-{number:05d}.tar"]
            there = [name in found for name in names]
            assert there == sorted(there), (names, there)
    assert objects(store) == expected
    assert verify(f"{OUT}/train-*.tar") == [] and len(open_dataset(OUT)) == 20
    made = {key: each["LastModified"] for key, each in _listed(store)}
    assert ingest(src, OUT, **OPTIONS) == (5, 20, 2)
    written = {key for key, each in _listed(store) if made[key] != each["LastModified"]}
    assert written <= {"sets/own/rejected.jsonl"}, "finished shards are not made again"


def _listed(store) -> list[tuple[str, dict]]:
    return [(each["Key"], each) for each in store.list_objects_v2(Bucket="bucket")["Contents"]]


def test_a_killed_ingest_continues(plan, store, src, expected, tmp_path) -> None:
    command = [sys.executable, "-m", "bifrost.trainer", "data", "ingest", str(src), OUT, "--samples-per-shard", "4"]
    plan.rules.append(Rule("reset", "00003.tar", 1000))  # it is not done before it is killed
    with subprocess.Popen([*command, "--processes", "1"], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while ".ingest/00002.json" not in objects(store):
            assert time.monotonic() < deadline and process.poll() is None
        process.kill()
    left = objects(store)
    assert left.items() < expected.items() and "train-00003.tar" not in left
    plan.rules.clear()
    plan.asked.clear()
    assert ingest(src, OUT, **OPTIONS) == (5, 20, 2)
    assert objects(store) == expected
    assert {path for method, path, _ in plan.asked if method == "PUT" and ".tar" in path} == {
        "/bucket/sets/own/train-00003.tar",
        "/bucket/sets/own/train-00004.tar",
    }


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda store, name: store.delete_object(Bucket="bucket", Key=f"{name}.tar"), "it is missing"),
        (lambda store, name: store.delete_object(Bucket="bucket", Key=f"{name}.index.jsonl"), "its index is missing"),
        (lambda store, name: store.put_object(Bucket="bucket", Key=f"{name}.tar", Body=b"cut"), "it has 3 bytes"),
    ],
)
def test_a_damaged_object_is_made_again(plan, store, src, expected, capfd, damage, reason) -> None:
    ingest(src, OUT, **OPTIONS)
    damage(store, "sets/own/train-00001")
    assert ingest(src, OUT, **OPTIONS) == (5, 20, 2)
    assert f"{OUT}/train-00001.tar: made again, since {reason}" in capfd.readouterr().err
    assert objects(store) == expected


def test_what_cannot_be_written_is_one_line(plan, store, src, tmp_path, s3) -> None:
    for out, message in (
        ("memory://sets", "written to a local folder or to an object store"),
        ("http://host/sets", "written to a local folder or to an object store"),
        ("s3://nowhere/sets", r"^s3://nowhere/sets.*bucket"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            ingest(src, out, **OPTIONS)
        assert "\n" not in str(caught.value) and not caught.value.transient
    store.put_object(Bucket="bucket", Key="sets/own/other.tar", Body=b"mine")
    with pytest.raises(DataError, match=r"other\.tar: not made by this ingest"):
        ingest(src, OUT, **OPTIONS)
    store.delete_object(Bucket="bucket", Key="sets/own/other.tar")
    ingest(src, OUT, **OPTIONS)
    with pytest.raises(DataError, match="started with another samples_per_shard"):
        ingest(src, OUT, samples_per_shard=5)


@pytest.mark.parametrize("fault", ["", "404 NoSuchUpload", "500", "reset"])
def test_a_shard_in_parts_is_there_once_it_is_complete(plan, store, monkeypatch, fault) -> None:
    """Parts and the request that joins them fail; the object that was there before remains until then."""
    from bifrost.data import write_shard

    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, **_: 5 << 20)
    key, image = "sets/own/x.tar", bytes(range(256)) * (11 << 12)
    store.put_object(Bucket="bucket", Key=key, Body=b"before")
    before: list[bytes] = []
    real = Plan.next

    def looked(self, method, path, asked_range) -> str | None:
        if method in ("PUT", "POST") and "x.tar" in path:
            before.append(objects(store)["x.tar"])
        return real(self, method, path, asked_range)

    monkeypatch.setattr(Plan, "next", looked)
    if fault:
        plan.rules += [Rule(fault, "x.tar.*uploadId", 3), Rule("reset", "x.tar.*partNumber=2", 2)]
    with staged("s3://bucket/sets/own/x.tar") as file:
        write_shard(file, [("a", {"png": image, "txt": b"a"})])
        whole = file.read_bytes()
    assert before[:5] == [b"before"] * 5
    assert set(before) <= {b"before", whole}, "a request that is repeated although it was served finds the whole object"
    assert objects(store)["x.tar"] == whole
    assert verify("s3://bucket/sets/own/x.tar") == []
    assert fsspec.filesystem("s3").exists("bucket/sets/own/x.index.jsonl")


def test_a_failed_shard_is_not_sent(plan, store) -> None:
    store.put_object(Bucket="bucket", Key="sets/own/x.tar", Body=b"before")

    def fail(file: Path) -> None:
        file.write_bytes(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), staged("s3://bucket/sets/own/x.tar") as file:
        fail(file)
    assert objects(store) == {"x.tar": b"before"}
