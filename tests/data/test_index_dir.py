"""Indexes and catalogues in a folder of their own: what is read equals what is read with those next to the shards."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

import object_store
from bifrost.data import DataError, index_shards, open_dataset, verify, write_shard
from bifrost.data.catalogue import NAME
from bifrost.data.catalogued import open_catalogued
from bifrost.data.index import index_path
from bifrost.data.index_dir import place_of
from bifrost.data.make_catalogue import make_catalogues
from bifrost.trainer.cli.main import data_app as app
from catalogued_folder import content
from thread_ranks import in_ranks

ADDRESSES = {
    "/data/a/x.tar": "own/file/data/a/x.index.jsonl",
    "/data/b/x.tar": "own/file/data/b/x.index.jsonl",
    "/s3/data/a/x.tar": "own/file/s3/data/a/x.index.jsonl",
    "s3://data/a/x.tar": "own/s3/data/a/x.index.jsonl",
    "s3://data/a//x.tar": "own/s3/data/a/%/x.index.jsonl",
    "s3://data/a/../x.tar": "own/s3/data/a/%2E%2E/x.index.jsonl",
    "s3://data/a/%/x.tar": "own/s3/data/a/%25/x.index.jsonl",
    "s3://data/a*/ü b.tar": "own/s3/data/a%2A/ü b.index.jsonl",
    "memory://data/a/x.tar": "own/memory/data/a/x.index.jsonl",
    "http://me:secret@host:8080/a/x.tar": "own/http/host%3A8080/a/x.index.jsonl",
    "https://host/a/x.tar": "own/https/host/a/x.index.jsonl",
}


def test_every_address_has_an_index_of_its_own() -> None:
    assert {shard: index_path(shard, "own/") for shard in ADDRESSES} == ADDRESSES
    assert len(set(ADDRESSES.values())) == len(ADDRESSES)
    same = {index_path(shard, "s3://own") for shard in ("a/x.tar", f"{os.getcwd()}/a/x.tar")}
    assert same == {f"s3://own/file{os.getcwd()}/a/x.index.jsonl"}
    assert index_path("memory:///data/x.tar", "own") == index_path("memory://data/x.tar", "own")
    assert index_path("s3://data/a/x.tar") == "s3://data/a/x.index.jsonl"


PLACES = [(served, own) for served in ("local", "http", "s3", "memory") for own in ("local", "memory")] + [("s3", "s3")]
"""Of the shards and of their indexes; both on S3, since there is one server's address."""


@pytest.fixture
def index_dir(request, tmp_path, served) -> str:
    """A folder for indexes; one on S3 for shards there."""
    if request.param == "s3":
        (tmp_path / "empty").mkdir()
        object_store.fill(request.getfixturevalue("s3"), "indexes", tmp_path / "empty")
    memory = fsspec.filesystem("memory")
    if memory.exists("/own"):
        memory.rm("/own", recursive=True)
    return {"local": f"{tmp_path}/own", "s3": "s3://indexes/own", "memory": "memory://own"}[request.param]


@pytest.fixture
def bare(served, folder) -> list:
    """What the served shards contain; then without their indexes."""
    _, address, upload = served
    expected = content(open_dataset(address + "s-{00000..00003}.tar"))
    for index in folder.glob("*.index.jsonl"):
        index.unlink()
    upload()
    return expected


@pytest.mark.parametrize(("served", "index_dir"), PLACES, indirect=True)
def test_equal_to_indexes_next_to_the_shards(served, folder, bare, index_dir) -> None:
    """Also from a catalogue, on one rank and on three. Nothing is written next to the shards."""
    spec = served[1] + "s-{00000..00003}.tar"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DataError, match=rf"s-00000\.tar: no index in {index_dir}; run .*--index-dir {index_dir}`$"):
        open_dataset(spec, index_dir=index_dir)
    assert "unindexed" in verify(spec, index_dir)[0]
    index_shards(spec, index_dir=index_dir)
    assert verify(spec, index_dir) == [] and index_shards(spec, True, index_dir) == []
    assert content(open_dataset(spec, index_dir=index_dir)) == bare
    with pytest.raises(DataError, match=r"no index next to it"):
        open_dataset(spec)
    (made,) = make_catalogues(spec, index_dir)
    assert made.place.url == place_of(served[1] + NAME, index_dir)

    def read(rank, gather) -> list:
        assert open_catalogued(spec, False, rank, gather, index_dir) is not None
        return content(open_dataset(spec, rank=rank, gather=gather, index_dir=index_dir))

    for ranks in (1, 3):
        assert in_ranks(read, ranks) == [bare] * ranks
    assert verify(spec, index_dir) == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    if served[1].startswith(("s3", "memory")):
        fs, path = fsspec.url_to_fs(served[1])
        assert {Path(name).name for name in fs.ls(path, detail=False)} == set(before)


@pytest.mark.parametrize("catalogued", [False, True])
@pytest.mark.parametrize(("served", "index_dir"), PLACES, indirect=True)
def test_a_shard_that_changed_is_noticed(served, folder, bare, index_dir, make_image, catalogued) -> None:
    _, address, upload = served
    spec = address + "s-*.tar"
    index_shards(spec, index_dir=index_dir)
    if catalogued:
        make_catalogues(spec, index_dir)
    write_shard(folder / "s-00001.tar", [("other", {"png": make_image(99), "txt": b"x"})])
    (folder / "s-00001.index.jsonl").unlink()
    upload()
    with pytest.raises(DataError, match=r"s-00001\.tar: (\d+ bytes, indexed|it was|.* expected)"):
        content(open_dataset(spec, index_dir=index_dir))
    assert any("s-00001.tar: altered" in line for line in verify(spec, index_dir))
    index_shards(address + "s-00001.tar", index_dir=index_dir)
    if catalogued:
        with pytest.raises(DataError, match=r"stale: .*s-00001.* changed; run .*--index-dir"):
            content(open_dataset(spec, index_dir=index_dir))
        make_catalogues(spec, index_dir)
    assert content(open_dataset(spec, index_dir=index_dir))[4][5][0] == "other"


def test_a_removed_index_is_noticed(served, bare, tmp_path) -> None:
    """At the opening if the catalogue has states, otherwise when the shard is first read."""
    spec, own = served[1] + "s-*.tar", f"{tmp_path}/own"
    index_shards(spec, index_dir=own)
    make_catalogues(spec, own)
    Path(index_path(f"{served[1]}s-00002.tar", own)).unlink()
    with pytest.raises(DataError, match=r"s-00002\.tar: (no index in|cannot be read)"):
        content(open_dataset(spec, index_dir=own))


def test_commands(folder, tmp_path, monkeypatch) -> None:
    """On a folder that cannot be written."""
    for index in folder.glob("*.index.jsonl"):
        index.unlink()
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK or str(path) != str(folder))
    run = CliRunner().invoke
    refused = run(app, ["index", str(folder)])
    assert "name another place with --index-dir" in str(refused.exception)
    own = ["--index-dir", f"{tmp_path}/own", str(folder)]
    for command, line in (("index", "4 shards indexed"), ("catalogue", NAME), ("verify", "0 with"), ("stats", "14")):
        ended = run(app, [command, *own])
        assert ended.exit_code == 0 and line in ended.output, ended.output
    assert not list(folder.glob("*.jsonl")) and not (folder / NAME).exists()
