"""Shards behind failing HTTP and S3 servers: what is read equals what was written, or the error has the cause."""

from __future__ import annotations

import gc
import math
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import fsspec
import pytest

import faulty_server
import object_store
from bifrost.data import DataError, DataLost, index_shards, open_dataset, retry, verify
from bifrost.data import kept as kept_module
from bifrost.data.files import Stream, content, exists
from bifrost.data.remote_file import RemoteFile
from bifrost.slurm.rank_env import free_port
from faulty_server import Plan, Rule


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Short pauses, of hundredths of a second, but the usual number of them."""
    monkeypatch.setattr(retry, "_sleep", lambda seconds: time.sleep(min(seconds, 0.02)))
    fsspec.filesystem("http").clear_instance_cache()
    yield
    fsspec.filesystem("http").clear_instance_cache()


@pytest.fixture
def folder(make_shards, tmp_path) -> Path:
    make_shards([5, 4, 3], folder=tmp_path)
    return tmp_path


@pytest.fixture(params=["http", "s3"])
def served(request, folder, monkeypatch):
    """(the server's plan, address of its shards without their numbers)."""
    plan = Plan()
    if request.param == "http":
        with faulty_server.serving(folder, plan) as (address, _):
            yield plan, f"{address}/s-"
        return
    import s3fs

    moto = request.getfixturevalue("s3")
    object_store.fill(moto, "bucket", folder)
    with faulty_server.serving(moto, plan) as (address, _):
        for name, value in object_store.environment(address).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield plan, "s3://bucket/s-"
        s3fs.S3FileSystem.clear_instance_cache()


def samples(dataset) -> list[tuple[str, bytes, str]]:
    raws = [dataset.read(s, n) for s, count in enumerate(dataset.samples_per_shard) for n in range(count)]
    return [(raw.key, raw.image, raw.caption) for raw in raws]


def test_read_equals_written(served, folder) -> None:
    plan, address = served
    expected = samples(open_dataset(str(folder / "s-*.tar")))
    assert samples(open_dataset(address + "{00000..00002}.tar")) == expected
    assert samples(open_dataset(address + "*.tar")) == expected
    assert verify(address + "{00000..00002}.tar") == []
    assert not plan.fired


@pytest.mark.parametrize("fault", faulty_server.FAULTS)
def test_recovers_from_each_fault(served, folder, fault, caplog) -> None:
    """Two faults on every index and shard: all samples are read, without errors."""
    plan, address = served
    expected = samples(open_dataset(str(folder / "s-*.tar")))
    plan.rules += [Rule(fault, f"s-0000{n}.{kind}", 2) for n in range(3) for kind in ("tar", "index")]
    dataset = open_dataset(address + "{00000..00002}.tar")
    plan.rules += [Rule(fault, f"s-0000{n}.{kind}", 2) for n in range(3) for kind in ("tar", "index")]
    assert samples(dataset) == expected
    plan.rules += [Rule(fault, f"s-0000{n}.tar", 2) for n in range(3)]
    assert verify(address + "{00000..00002}.tar") == []
    assert plan.fired[fault] >= 6


def test_server_that_is_down_is_data_lost_not_missing(folder, monkeypatch) -> None:
    port = free_port()
    for name, value in object_store.environment(f"http://127.0.0.1:{port}").items():
        monkeypatch.setenv(name, value)
    for address in (f"http://127.0.0.1:{port}/s-00000.tar", "s3://bucket/s-00000.tar", "s3://bucket/s-*.tar"):
        for work in (open_dataset, verify, partial(index_shards, index_dir=str(folder / "own"))):
            with pytest.raises(DataLost, match="check the storage or the network") as caught:
                work(address)
            assert "no such shard" not in str(caught.value)
    with pytest.raises(DataLost):
        exists(f"http://127.0.0.1:{port}/s-00000.tar")


def test_server_that_comes_up_late(folder, monkeypatch) -> None:
    port = free_port()
    opened: list = []
    monkeypatch.setattr(retry, "_sleep", lambda seconds: time.sleep(min(seconds, 0.3)))
    reader = threading.Thread(
        target=lambda: opened.append(open_dataset(f"http://127.0.0.1:{port}/s-{{00000..00002}}.tar"))
    )
    reader.start()
    time.sleep(0.4)
    with faulty_server.serving(folder, port=port):
        reader.join(20)
        assert samples(opened[0]) == samples(open_dataset(str(folder / "s-*.tar")))


def test_missing_objects(served, tmp_path) -> None:
    _, address = served
    with pytest.raises(DataError, match=r"s-00009\.tar: no such shard"):
        open_dataset(address + "00009.tar")
    assert not exists(address + "00009.tar") and exists(address + "00001.tar")
    with pytest.raises(DataError, match="no such shard"):
        index_shards(address + "00009.tar", index_dir=str(tmp_path / "own"))


def test_missing_credentials_are_a_one_line_error(monkeypatch, folder) -> None:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"^s3://bucket/a\.tar: Unable to locate credentials; set or renew") as caught:
        open_dataset("s3://bucket/a.tar")
    assert not isinstance(caught.value, DataLost)
    s3fs.S3FileSystem.clear_instance_cache()


def test_forbidden_object(folder) -> None:
    plan = Plan([Rule("500", "index", 0)])
    with faulty_server.serving(folder, plan) as (address, _):
        plan.next = lambda *_: "403"  # type: ignore[method-assign]
        source = faulty_server._Handler._answer

        def refuse(self, status, headers, body, **kwargs):
            source(self, 403, {}, b"no")

        faulty_server._Handler._answer, before = refuse, source
        try:
            with pytest.raises(DataError, match="check the permissions, or your credentials") as caught:
                open_dataset(f"{address}/s-00000.tar")
        finally:
            faulty_server._Handler._answer = before
    assert not isinstance(caught.value, DataLost)


def test_server_without_ranges(folder, caplog) -> None:
    """Each shard is fetched once, logged once and read correctly."""
    plan = Plan(ranges=False)
    with faulty_server.serving(folder, plan) as (address, _):
        dataset = open_dataset(f"{address}/s-{{00000..00002}}.tar")
        plan.asked.clear()
        assert samples(dataset) == samples(open_dataset(str(folder / "s-*.tar")))
        assert len([path for method, path, _ in plan.asked if method == "GET" and path.endswith(".tar")]) == 3
        assert caplog.text.count("the server ignores byte ranges") == 3
        assert verify(f"{address}/s-{{00000..00002}}.tar") == []
        gc.collect()  # what `verify` has read
        in_all = kept_module.Kept._total
        del dataset
        gc.collect()
        assert in_all - kept_module.Kept._total == sum((folder / f"s-0000{n}.tar").stat().st_size for n in range(3))


def test_server_that_always_compresses(folder) -> None:
    """Its Content-Length is that of the compressed bytes."""
    with faulty_server.serving(folder, Plan(ranges=False, packed=True)) as (address, _):
        dataset = open_dataset(f"{address}/s-{{00000..00002}}.tar")
        assert samples(dataset) == samples(open_dataset(str(folder / "s-*.tar")))
        assert verify(f"{address}/s-{{00000..00002}}.tar") == []


@pytest.mark.parametrize("fault", ["cut", "cut-unstated", "503", "reset"])
def test_failing_server_without_ranges(folder, fault) -> None:
    """Also when only the end of the connection marks the end of an index or a shard."""
    plan = Plan([Rule(fault, f"s-0000{n}.{kind}", 2) for n in range(3) for kind in ("tar", "index")], ranges=False)
    with faulty_server.serving(folder, plan) as (address, _):
        dataset = open_dataset(f"{address}/s-{{00000..00002}}.tar")
        plan.rules += [Rule(fault, f"s-0000{n}.{kind}", 2) for n in range(3) for kind in ("tar", "index")]
        assert samples(dataset) == samples(open_dataset(str(folder / "s-*.tar")))
        plan.rules += [Rule(fault, f"s-0000{n}.{kind}", 2) for n in range(3) for kind in ("tar", "index")]
        assert verify(f"{address}/s-{{00000..00002}}.tar") == []


def test_server_without_ranges_and_too_much_data(folder, monkeypatch) -> None:
    gc.collect()  # objects of earlier tests, which would free space if collected later
    kept = kept_module.Kept._total
    monkeypatch.setattr(kept_module, "WHOLE_LIMIT", kept + 8000)
    with faulty_server.serving(folder, Plan(ranges=False)) as (address, _):
        dataset = open_dataset(f"{address}/s-00000.tar")
        with pytest.raises(DataError, match=r"s-00000\.tar: the server ignores byte ranges, and whole") as caught:
            samples(dataset)
    assert not isinstance(caught.value, DataLost) and kept_module.Kept._total == kept


def test_empty_objects_and_empty_ranges(served, folder) -> None:
    plan, address = served
    assert content(address + "00000.index.jsonl", 10) == (folder / "s-00000.index.jsonl").read_bytes()[:10]
    plan.asked.clear()
    with_size = RemoteFile(address + "00000.tar")
    assert with_size.read(100, 0) == b"" and plan.asked == []
    size = (folder / "s-00000.tar").stat().st_size
    assert with_size.read(size - 10, 100) == (folder / "s-00000.tar").read_bytes()[-10:]
    assert with_size.read(size, 10) == b""


def test_empty_index_is_damaged(s3, folder, monkeypatch) -> None:
    import s3fs

    (folder / "s-00000.index.jsonl").write_bytes(b"")
    object_store.fill(s3, "empty", folder)
    for name, value in object_store.environment(s3).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match="damaged index"):
        open_dataset("s3://empty/s-00000.tar")
    s3fs.S3FileSystem.clear_instance_cache()


def test_shard_replaced_while_being_read(served, folder, make_shards, tmp_path, s3) -> None:
    _, address = served
    dataset = open_dataset(address + "00000.tar")
    dataset.read(0, 0)
    for content_of, message in [
        (lambda data: data[:-512] + b"\1" * 512, "was replaced while being read"),  # of the same size
        (lambda data: data + bytes(512), "bytes, expected"),
    ]:
        data = (folder / "s-00000.tar").read_bytes()
        (folder / "s-00000.tar").write_bytes(content_of(data))
        if address.startswith("s3"):
            object_store.fill(s3, "bucket", folder, "s-00000.tar")
        with pytest.raises(DataError, match=message) as caught:
            dataset.read(0, 1)
        assert not isinstance(caught.value, DataLost)


def test_replaced_shard_of_equal_size_is_detected(folder, tmp_path) -> None:
    """Without an ETag, by the headers of the tar."""
    shutil.copytree(folder, tmp_path / "web")
    web = tmp_path / "web"
    with faulty_server.serving(web) as (address, _):
        dataset = open_dataset(f"{address}/s-00000.tar")
        data = (web / "s-00000.tar").read_bytes()
        (web / "s-00000.tar").write_bytes(data[512:] + bytes(512))
        with pytest.raises(DataError, match=r"sample .* is not at the offset in the index; run `bifrost data verify`"):
            dataset.read(0, 1)


def test_remote_index_equals_local_index(served, folder, s3) -> None:
    """Read in blocks, despite faults, up to the end: bytewise equal to the local index, also when stored on S3."""
    plan, address = served
    plan.rules.append(Rule("cut", "s-00000.tar", 2))
    with Stream(address + "00000.tar") as stream:
        parts = []
        while part := stream.read(1000):
            parts.append(part)
    assert b"".join(parts) == (folder / "s-00000.tar").read_bytes()
    if address.startswith("s3"):
        fs = fsspec.filesystem("s3")
        fs.rm_file("bucket/s-00001.index.jsonl")
        plan.rules.append(Rule("503", "s-00001.index.jsonl", 2))
        index_shards(address + "{00000..00002}.tar", only_missing=True)
        assert fs.cat_file("bucket/s-00001.index.jsonl") == (folder / "s-00001.index.jsonl").read_bytes()


def test_truncated_object_is_damaged(served, folder, s3) -> None:
    _, address = served
    data = (folder / "s-00000.tar").read_bytes()
    (folder / "s-00000.tar").write_bytes(data[: len(data) // 2])
    if address.startswith("s3"):
        object_store.fill(s3, "bucket", folder)
    (problem,) = verify(address + "{00000..00002}.tar")
    assert "s-00000.tar: truncated" in problem


CIRCLE = "the server redirects in a loop; check the address or endpoint"
LISTS = r"not an S3 response to ListObjectsV2|no \.tar matches"
"""Over HTTP, a web page without links is an empty listing."""


@pytest.mark.parametrize(
    ("fault", "opening", "listing", "most"),
    [
        ("redirect self", CIRCLE, CIRCLE, 40),
        ("redirect", r"redirects .*\(status 302\)", r"redirects .*\(status 302\)|no \.tar matches", 8),
        ("301 PermanentRedirect", r"redirects .*\(status 301\)", r"redirects .*\(status 301\)|no \.tar matches", 8),
        ("redirect ftp://h/x", "redirects to ftp://h/x; check the address", "redirects to ftp://h/x; check", 8),
        ("redirect http://[h", r"redirects to http://\[h", r"redirects to http://\[h", 8),
        ("page", "received a web page instead of the file; check the address", LISTS, 24),
        ("empty", "damaged catalogue", "damaged catalogue", 24),
        ("204", "sent no file|not an S3 response to GetObject", LISTS, 24),
    ],
)
def test_unusable_responses_are_permanent(served, fault, opening, listing, most) -> None:
    """One line and code 2, soon: restarting the job would not help."""
    plan, address = served
    plan.rules.append(Rule(fault, "", math.inf))
    for place, message in ((address + "00000.tar", opening), (address + "*.tar", listing)):
        plan.asked.clear()
        with pytest.raises(DataError, match=message) as caught:
            open_dataset(place)
        assert not isinstance(caught.value, DataLost) and len(plan.asked) <= most
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("served", ["http"], indirect=True)
@pytest.mark.parametrize("path", ["", "s-00000.tar", "s-00000.index.jsonl"])
def test_a_login_page_is_neither_a_shard_nor_an_index(served, path, tmp_path) -> None:
    """In place of both or of one, for every command that looks at them."""
    plan, address = served
    plan.rules.append(Rule("page", path, math.inf))
    works = [open_dataset, verify]
    works += [] if path else [partial(index_shards, only_missing=True, index_dir=str(tmp_path))]
    for work in works:
        with pytest.raises(DataError, match=r"s-00000.*: received a web page instead of the file; check the address"):
            print(work(address + "00000.tar"))


@pytest.mark.parametrize("served", ["s3"], indirect=True)
@pytest.mark.parametrize("code", ["400 SlowDown", "409 OperationAborted"])
def test_retryable_codes_with_status_400_and_409(served, folder, code) -> None:
    """Codes that S3 describes as retryable are retried, although a response to HEAD has no code."""
    plan, address = served
    plan.rules += [Rule(code, "s-00000.tar", 3), Rule(code, "s-00000.index", 2)]
    dataset = open_dataset(address + "00000.tar")
    plan.rules.append(Rule(code, "s-00000.tar", 2))
    assert samples(dataset) == samples(open_dataset(str(folder / "s-00000.tar")))
    plan.rules.append(Rule(code, "list-type", 2))
    assert len(open_dataset(address + "*.tar").shards) == 3
    assert not any(rule.times for rule in plan.rules)
    plan.rules.append(Rule(code, "s-00000", math.inf))
    with pytest.raises(DataLost, match="another attempt may succeed"):
        open_dataset(address + "00000.tar")


@pytest.mark.parametrize("served", ["s3"], indirect=True)
def test_expired_token_is_named_although_head_has_no_code(served) -> None:
    plan, address = served
    plan.rules.append(Rule("400 ExpiredToken", "s-00000", math.inf))
    with pytest.raises(DataError, match=r"ExpiredToken.*set or renew the client's credentials") as caught:
        open_dataset(address + "00000.tar")
    assert not isinstance(caught.value, DataLost) and len(plan.asked) <= 5


@pytest.mark.parametrize("fault", ["wrong-range", "short-206"])
def test_server_that_always_sends_wrong_ranges(served, fault) -> None:
    plan, address = served
    dataset = open_dataset(address + "00000.tar")
    plan.rules.append(Rule(fault, "s-00000.tar", math.inf))
    plan.asked.clear()
    with pytest.raises(DataError, match=r"received.*; check the address, and the server or a proxy") as caught:
        dataset.read(0, 1)
    assert not isinstance(caught.value, DataLost) and len(plan.asked) >= 4
