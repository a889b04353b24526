"""A data set opened from a catalogue equals the one opened without."""

from __future__ import annotations

import math
import os
import random
import shutil
from dataclasses import replace

import fsspec
import numpy as np
import pytest
from botocore.utils import parse_timestamp
from typer.testing import CliRunner

import faulty_server
import object_store
from bifrost.data import DataError, DataLost, catalogue, catalogue_state, open_dataset, remote, write_shard
from bifrost.data.catalogue import NAME
from bifrost.data.make_catalogue import make_catalogues
from bifrost.trainer.cli.main import data_app as app
from catalogued_folder import SERVERS, content, is_catalogued, write
from faulty_server import Plan, Rule
from thread_ranks import in_ranks


@pytest.mark.parametrize("ranks", [1, 3])
def test_equal_to_opening_every_shard(served, folder, ranks) -> None:
    _, address, upload = served
    specs = [
        address + "s-{00000..00003}.tar",
        address + "s-*.tar",
        address,
        [address + "s-00002.tar", address + "s-0*0.tar"],
    ]
    expected = [content(open_dataset(spec)) for spec in specs]
    write(address, folder, upload)
    for spec, without in zip(specs, expected, strict=True):
        assert is_catalogued(spec)
        for dataset in in_ranks(lambda rank, gather, spec=spec: open_dataset(spec, rank=rank, gather=gather), ranks):
            assert content(dataset) == without


@pytest.mark.parametrize("served", SERVERS, indirect=True)
def test_requests_do_not_grow_with_the_shards(served, folder) -> None:
    """Per rank one for the catalogue, and one listing on S3 or one shard and its index over HTTP."""
    plan, address, upload = served
    write(address, folder, upload)
    open_dataset(address + "s-00000.tar")  # s3fs looks the bucket up once
    counts = []
    for last in (0, 3):
        plan.asked.clear()
        open_dataset(f"{address}s-{{00000..{last:05d}}}.tar")
        counts.append(len(plan.asked))
    assert counts in ([2, 2], [3, 3])


def test_listing_in_parts_finds_every_shard(folder, request, monkeypatch) -> None:
    """Also names whose indexes are sorted in another order than they are, and files between them."""
    import s3fs

    for name in ("s.tar", "s.m.tar", "s-00001-b.tar"):
        shutil.copy(folder / "s-00000.tar", folder / name)
        shutil.copy(folder / "s-00000.index.jsonl", folder / name.replace(".tar", ".index.jsonl"))
    (folder / "s-00001.json").write_text("{}")
    moto = request.getfixturevalue("s3")
    object_store.fill(moto, "bucket", folder)
    for name, value in object_store.environment(moto).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    from bifrost.data import catalogued, make_catalogue

    for module in (catalogued, make_catalogue):
        monkeypatch.setattr(module, "CHUNK", 1)
    expected = content(open_dataset("s3://bucket/"))
    make_catalogues("s3://bucket/*.tar")
    opened: list[str] = []
    times, parsed = [], remote._timestamp
    monkeypatch.setattr(remote, "_timestamp", lambda text: times.append(text) or parsed(text))
    s3fs.S3FileSystem.clear_instance_cache()
    real = catalogued.open_header
    monkeypatch.setattr(catalogued, "open_header", lambda shard, *apart: opened.append(shard) or real(shard, *apart))
    for ranks in (1, 2):
        for dataset in in_ranks(lambda rank, gather: open_dataset("s3://bucket", rank=rank, gather=gather), ranks):
            assert content(dataset) == expected
    assert not opened and times
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    "text",
    [
        *("2026-11-29T01:02:03.456Z", "2026-11-29T01:02:03Z", "2026-11-29T01:02:03+02:00", "20261129T010203Z"),
        *("Sun, 29 Nov 2026 01:02:03 GMT", "1796000000", 1796000000.5),
    ],
)
def test_times_in_listings_are_botocores(text) -> None:
    found, expected = remote._timestamp(text), parse_timestamp(text)
    assert found == expected and found.utcoffset() == expected.utcoffset()


def test_errors_of_shards_are_those_without_a_catalogue(folder) -> None:
    make_catalogues(str(folder))
    spec = str(folder / "s-{00000..00003}.tar")
    with pytest.raises(DataError, match=r"s-00009\.tar: no such shard.*bifrost data ingest"):
        open_dataset(str(folder / "s-0000{0,9}.tar"))
    with pytest.raises(DataError, match=r"no \.tar matches"):
        open_dataset(str(folder / "x-*.tar"))
    with pytest.raises(DataError, match="named twice"):
        open_dataset([spec, str(folder / "s-00001.tar")])
    os.truncate(folder / "s-00002.tar", 5000)
    with pytest.raises(DataError, match=r"s-00002\.tar: 5000 bytes, indexed as .* truncated"):
        open_dataset(spec)
    (folder / "s-00002.index.jsonl").unlink()
    with pytest.raises(DataError, match="no index next to it"):
        make_catalogues(spec)


def test_held_out_shards_in_the_folder_are_refused(tmp_path, make_image) -> None:
    for name in ("train-0", "val-0"):
        write_shard(tmp_path / f"{name}.tar", [("k", {"png": make_image(0), "txt": b"x"})])
    with pytest.raises(DataError) as without:
        open_dataset(str(tmp_path))
    make_catalogues(str(tmp_path / "train-*.tar"))
    with pytest.raises(DataError) as caught:
        open_dataset(str(tmp_path))
    assert str(caught.value) == str(without.value)
    assert len(open_dataset(str(tmp_path / "val-*.tar")).shards) == 1


def test_the_callers_random_numbers_stay_the_same(folder) -> None:
    fs = fsspec.filesystem("memory")
    make_catalogues(str(folder))
    for file in folder.iterdir():
        fs.pipe_file(f"/drawn/{file.name}", file.read_bytes())
    before = random.getstate()
    assert is_catalogued("memory://drawn")
    assert random.getstate() == before


def test_queries_of_addresses_are_not_wildcards(folder) -> None:
    make_catalogues(str(folder))
    with faulty_server.serving(folder, Plan()) as (address, _):
        assert is_catalogued(f"{address}/s-*.tar") and not is_catalogued(f"{address}/s-00000.tar?version=1")


def test_several_folders(folder, tmp_path, make_shards, caplog) -> None:
    make_shards([2, 1], folder=tmp_path / "b")
    specs = [f"{folder}/s-*.tar", f"{tmp_path}/b/s-0000{{1,0}}.tar"]
    expected = content(open_dataset(specs))
    make_catalogues(str(folder))
    assert content(open_dataset(specs)) == expected
    assert "has no catalogue" in caplog.text
    make_catalogues(specs)
    assert is_catalogued(specs) and is_catalogued(f"{tmp_path}/{{b,set}}/s-*.tar")
    assert content(open_dataset(specs)) == expected


def test_relative_paths(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    specs = ["s-*.tar", "s-0000{0..3}.tar", ".", "../set", "./s-00001.tar"]
    expected = [content(open_dataset(spec)) for spec in specs]
    make_catalogues("s-*.tar")
    for spec, without in zip(specs, expected, strict=True):
        assert is_catalogued(spec)
        assert content(open_dataset(spec)) == without


def test_command(folder, monkeypatch) -> None:
    result = CliRunner().invoke(app, ["catalogue", f"{folder}/s-*.tar"])
    assert result.exit_code == 0 and result.stdout == f"{folder}/{NAME}: 4 shards, 14 samples\n"
    before = (folder / NAME).read_bytes()
    assert sorted(path.suffix for path in folder.iterdir()).count(".catalogue") == 1

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DataError, match="No space left on device; free disk space"):
        make_catalogues(str(folder))
    assert (folder / NAME).read_bytes() == before and len(list(folder.iterdir())) == 9


def test_folder_that_cannot_be_written(folder, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    result = CliRunner().invoke(app, ["catalogue", str(folder)])
    assert isinstance(result.exception, DataError) and "not writable, and a catalogue is stored in it" in str(
        result.exception
    )
    assert not (folder / NAME).exists() and len(open_dataset(str(folder))) == 14


@pytest.mark.parametrize("served", SERVERS, indirect=True)
def test_server_that_is_down_is_data_lost(served, folder, monkeypatch, caplog) -> None:
    plan, address, upload = served
    write(address, folder, upload)
    plan.rules.append(Rule("503", NAME, 2))
    assert is_catalogued(address + "s-00000.tar")
    plan.rules.append(Rule("503", NAME, math.inf))
    with pytest.raises(DataLost, match="another attempt may succeed"):
        open_dataset(address + "s-00000.tar")
    if address.startswith("s3"):  # without permission to list the bucket
        plan.rules[:] = [Rule("403 AccessDenied", "list-type", math.inf)]
        monkeypatch.setattr("bifrost.data.catalogued.CHUNK", 1)
        caplog.clear()
        opened = in_ranks(lambda *rank: open_dataset(address + "s-*.tar", rank=rank[0], gather=rank[1]), 2)
        assert [len(each) for each in opened] == [14, 14]
        (line,) = [each.message for each in caplog.records if each.name.startswith("bifrost")]
        assert "ListObjectsV2" in line and "when they are first read" in line


def test_numbers_are_kept_exactly(tmp_path) -> None:
    from bifrost.data.index import Header

    headers = [Header(1, 2**40 + n, f"{n:064x}", 2**33 + n, 7, (1, 2**31, 2**50), 2**45) for n in range(3)]
    names, place = ["a.tar", "b\udcff.tar", "ü.tar"], catalogue.Place(f"{tmp_path}/")
    catalogue.save(catalogue.from_headers(place, names, headers, np.arange(9).reshape(3, 3) - 4, "file"))
    found = catalogue.load(place)
    assert list(found.headers([2, 0])) == [headers[2], headers[0]]
    assert found.names == names and found.numbers[-3:].tolist() == [[-4, -3, -2], [-1, 0, 1], [2, 3, 4]]
    assert found.origin == catalogue_state.LOCAL
    odd = [replace(headers[1], sha256="A" * 64), replace(headers[1], samples=1.5), replace(headers[1], bytes=2**63)]
    for header in odd:
        with pytest.raises(DataError, match=r"b\udcff.index.jsonl: damaged index"):
            catalogue.from_headers(place, names, [headers[0], header, headers[2]], np.zeros((3, 3), np.int64), "file")
