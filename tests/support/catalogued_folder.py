"""A folder of shards with a catalogue, served by every kind of storage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

import faulty_server
import object_store
from bifrost.data import retry
from bifrost.data.catalogued import open_catalogued
from bifrost.data.make_catalogue import make_catalogues
from faulty_server import Plan

SERVERS = ("http", "s3")
KINDS = ("local", *SERVERS, "memory")
RENEWAL = r"; run `bifrost data catalogue .+`$"


@contextmanager
def serving(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, s3) -> Iterator[tuple]:
    """(the server's plan or None, address of the folder, function that copies a changed folder there). s3: returns the
    address of an object store."""
    monkeypatch.setattr(retry, "_sleep", lambda seconds: time.sleep(min(seconds, 0.02)))
    plan = Plan()
    if kind == "local":
        yield None, f"{folder}/", lambda: None
    elif kind == "memory":
        fs = fsspec.filesystem("memory")

        def upload() -> None:
            fs.rm("/cat", recursive=True) if fs.exists("/cat") else None
            for file in folder.iterdir():
                fs.pipe_file(f"/cat/{file.name}", file.read_bytes())

        upload()
        yield None, "memory://cat/", upload
    elif kind == "http":
        fsspec.filesystem("http").clear_instance_cache()
        with faulty_server.serving(folder, plan) as (address, _):
            yield plan, f"{address}/", lambda: None
        fsspec.filesystem("http").clear_instance_cache()
    else:
        import s3fs

        moto = s3()
        object_store.fill(moto, "bucket", folder)
        with faulty_server.serving(moto, plan) as (address, _):
            for name, value in object_store.environment(address).items():
                monkeypatch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            yield plan, "s3://bucket/", lambda: object_store.fill(moto, "bucket", folder)
            s3fs.S3FileSystem.clear_instance_cache()


def write(address: str, folder: Path, upload) -> None:
    """Write the catalogue of the served folder; over HTTP, where the shards are stored."""
    make_catalogues(str(folder) if address.startswith("http") else f"{address}*.tar")


def content(dataset) -> list:
    raws = [dataset.read(s, n) for s, count in enumerate(dataset.samples_per_shard) for n in range(count)]
    found = [(raw.key, raw.image, raw.caption) for raw in raws]
    return [dataset.shards, list(dataset.headers), dataset.samples_per_shard.tolist(), dataset.fingerprint, found]


def is_catalogued(spec) -> bool:
    return open_catalogued(spec, True, 0, lambda value: [value]) is not None
