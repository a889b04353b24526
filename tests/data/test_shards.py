from __future__ import annotations

import errno
import hashlib
import os
import pickle
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import fsspec
import numpy as np
import pytest

from bifrost.data import BadSample, DataError, DataLost, index, open_dataset, retry, shards, write_shard
from bifrost.data.shard_list import expand
from thread_ranks import in_ranks


def test_specs_expand_to_sorted_shards(make_shards, tmp_path):
    make_shards([2, 3, 4])
    names = [str(tmp_path / f"s-{i:05d}.tar") for i in range(3)]
    for spec in (
        str(tmp_path / "s-{00000..00002}.tar"),
        str(tmp_path / "*"),
        names[::-1],
        str(tmp_path / "s-0000?.tar"),
    ):
        assert open_dataset(spec).shards == names
    dataset = open_dataset([names[2], names[0]])
    assert dataset.samples_per_shard.tolist() == [2, 4]
    assert dataset.samples_per_shard.dtype == np.int64
    assert len(dataset) == 6
    assert expand("x{08..10}.tar") == ["x08.tar", "x09.tar", "x10.tar"]


@pytest.mark.parametrize("spec", ["mine/*.tar", "mine/s-00000.tar", "empty"])
def test_relative_path_is_shown_with_working_directory(spec, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f", relative to {tmp_path}; check the path"):
        open_dataset(spec)
    with pytest.raises(DataError) as caught:
        open_dataset(str(tmp_path / spec))
    assert "relative to" not in str(caught.value)


def test_quoted_home_folder_is_expanded(make_shards, tmp_path, monkeypatch):
    make_shards([2, 3])
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [str(tmp_path / f"s-{i:05d}.tar") for i in range(2)]
    assert expand("~/*.tar") == expand("~") == expand("~/s-{00000..00001}.tar") == names


def test_reading_gives_each_sample(make_shards, make_image):
    dataset = make_shards([3, 2])
    number = 0
    for shard, count in enumerate([3, 2]):
        for sample in range(count):
            raw = dataset.read(shard, sample)
            assert (raw.key, raw.caption) == (f"key-{number:04d}", f"caption {number}")
            assert raw.image == make_image(number)
            number += 1


def test_fingerprint_depends_on_content_and_order(make_shards, tmp_path):
    dataset = make_shards([2, 3])
    hashes = [hashlib.sha256((tmp_path / f"s-0000{i}.tar").read_bytes()).hexdigest() for i in range(2)]
    assert dataset.fingerprint == hashlib.sha256("".join(hashes).encode()).hexdigest()
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert open_dataset(str(tmp_path / "copy/s-*.tar")).fingerprint == dataset.fingerprint
    assert open_dataset(str(tmp_path / "s-00001.tar")).fingerprint != dataset.fingerprint


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_urls(make_shards, tmp_path, make_image, scheme):
    make_shards([2, 2])
    if scheme == "memory":
        fs = fsspec.filesystem("memory")
        for path in tmp_path.iterdir():
            fs.pipe_file(f"/bucket/{path.name}", path.read_bytes())
        root = "memory://bucket"
    else:
        root = f"file://{tmp_path}"
    try:
        for spec in (f"{root}/s-{{00000..00001}}.tar", f"{root}/*.tar"):
            dataset = open_dataset(spec)
            assert len(dataset.shards) == 2
            assert dataset.read(1, 1).image == make_image(3)
            assert dataset.read(1, 1).caption == "caption 3"
        with pytest.raises(DataError, match=r"s-00002\.tar: no such shard"):
            open_dataset(f"{root}/s-{{00000..00002}}.tar")
    finally:
        if scheme == "memory":
            fs.rm("/bucket", recursive=True)


def test_few_shards_stay_open_and_all_stay_readable(make_shards, tmp_path):
    make_shards([1] * 12)
    dataset = open_dataset(str(tmp_path / "s-*.tar"), max_open=3)

    def open_files():
        links = [os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith(str(tmp_path)) for link in links if os.path.islink(link))

    for _ in range(2):
        for shard in range(12):
            dataset.read(shard, 0)
            assert open_files() <= 3
    assert pickle.loads(pickle.dumps(dataset)).read(5, 0).key == "key-0005"


def test_forked_child_reads_concurrently_with_its_parent(make_shards):
    dataset = make_shards([40])
    dataset.read(0, 0)
    child = os.fork()
    if child == 0:
        good = all(dataset.read(0, i).key == f"key-{i:04d}" for _ in range(20) for i in range(40))
        os._exit(0 if good else 1)
    assert all(dataset.read(0, i).key == f"key-{i:04d}" for _ in range(20) for i in reversed(range(40)))
    assert os.waitpid(child, 0)[1] == 0


def test_errors_contain_place_and_remedy(make_shards, tmp_path, make_image, monkeypatch):
    make_shards([2, 2])
    first = str(tmp_path / "s-00000.tar")
    write_shard(tmp_path / "mute/a.tar", [("k", {"png": make_image(0)})])
    for spec, message in [
        (str(tmp_path / "s-{00000..00003}.tar"), r"s-00002\.tar: no such shard.*bifrost data ingest"),
        (str(tmp_path / "other-*.tar"), r"no \.tar matches.*bifrost data ingest"),
        ([first, first], "named twice"),
        (str(tmp_path / "none"), "neither a shard nor a folder"),
        ([], "no shards named"),
        ("x{0..", "write ranges as"),
        (str(tmp_path / "mute/*.tar"), "no captions.*bifrost data ingest"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            open_dataset(spec)
        assert "\n" not in str(caught.value)
    os.truncate(first, 5000)
    with pytest.raises(DataError, match=r"s-00000\.tar: 5000 bytes, indexed as .* truncated"):
        open_dataset(first)

    def denied(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    with monkeypatch.context() as patch:
        patch.setattr(index, "open", denied, raising=False)
        with pytest.raises(DataError, match=r"s-00001\.tar: Permission denied; "):
            open_dataset(str(tmp_path / "s-00001.tar"))
    os.unlink(tmp_path / "s-00001.index.jsonl")
    with pytest.raises(DataError, match=r"s-00001\.tar: no index next to it; run `bifrost data index"):
        open_dataset(str(tmp_path / "s-00001.tar"))
    (tmp_path / "s-00001.index.jsonl").write_text('{"version": 9, "new": 1}\n')
    with pytest.raises(DataError, match="index version 9, expected 2"):
        open_dataset(str(tmp_path / "s-00001.tar"))
    (tmp_path / "s-00001.index.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="damaged index"):
        open_dataset(str(tmp_path / "s-00001.tar"))


def test_bad_samples_have_a_reason(tmp_path, make_image):
    samples = [
        ("mute", {"png": make_image(0)}),
        ("blank", {"png": make_image(0), "txt": b" \n"}),
        ("latin", {"png": make_image(0), "txt": b"caf\xe9"}),
        ("fine", {"png": make_image(0), "txt": b"ok"}),
        ("last", {"png": make_image(0), "txt": b"ok"}),
    ]
    write_shard(tmp_path / "a.tar", samples)
    dataset = open_dataset(str(tmp_path / "a.tar"))
    for sample, reason in enumerate(["no caption", "caption is empty", "caption is not UTF-8"]):
        with pytest.raises(BadSample) as caught:
            dataset.read(0, sample)
        assert (caught.value.key, caught.value.reason) == (samples[sample][0], reason)
    assert dataset.read(0, 3).caption == "ok"
    os.truncate(tmp_path / "a.tar", (tmp_path / "a.tar").stat().st_size - 10240)
    with pytest.raises(BadSample, match="the shard ends inside it"):
        dataset.read(0, 4)


@pytest.mark.parametrize("url", ["nothing://bucket/{0..3}.tar", "nothing://bucket/*.tar"])
def test_unknown_protocol_is_named(url):
    with pytest.raises(DataError, match=r"nothing://bucket/.*\.tar: Protocol not known: nothing; check the address"):
        open_dataset(url)


def test_ranks_split_the_opening_of_shards(make_shards, tmp_path, monkeypatch):
    whole = make_shards([2, 3, 4, 5, 6])
    looked, real = [], shards.open_header
    monkeypatch.setattr(shards, "open_header", lambda shard, *apart: looked.append(shard) or real(shard, *apart))
    spec = str(tmp_path / "s-*.tar")
    for dataset in in_ranks(lambda rank, gather: open_dataset(spec, rank=rank, gather=gather), 3):
        assert (dataset.shards, dataset.headers) == (whole.shards, whole.headers)
        assert dataset.fingerprint == whole.fingerprint
    assert sorted(looked) == whole.shards, "each once"


def test_names_of_shards_are_broadcast_and_not_gathered(make_shards, tmp_path):
    """A gather of objects takes the memory of the longest list of names for every rank."""
    whole, gathered = make_shards([2, 3, 4]), []
    spec = str(tmp_path / "s-*.tar")

    def opened(rank, gather):
        def noted(value):
            gathered.append(repr(value))
            return gather(value)

        return open_dataset(spec, rank=rank, gather=noted, broadcast=lambda value: gather(value)[0])

    assert [dataset.shards for dataset in in_ranks(opened, 2)] == [whole.shards] * 2
    assert gathered and not any("s-0000" in each for each in gathered)


def test_an_error_of_one_rank_is_raised_on_all(make_shards, tmp_path):
    make_shards([2, 3, 4, 5, 6])
    spec = str(tmp_path / "s-*.tar")

    def refused(rank, gather):
        with pytest.raises(DataError, match=r"s-00003\.tar: no index next to it"):
            open_dataset(spec, rank=rank, gather=gather)
        return True

    (tmp_path / "s-00003.index.jsonl").unlink()
    assert in_ranks(refused, 3) == [True] * 3


def test_vanished_shard_is_named(make_shards, tmp_path):
    dataset = make_shards([2, 2])
    (tmp_path / "s-00001.tar").unlink()
    with pytest.raises(DataLost, match=r"s-00001\.tar: cannot be read any more"):
        dataset.read(1, 0)


def test_read_is_retried_with_a_new_handle(make_shards, monkeypatch, caplog):
    """With a reopened file: a stale handle of a network file system stays stale."""
    monkeypatch.setattr(retry, "_sleep", lambda seconds: None)
    dataset = make_shards([2, 2])
    assert dataset.read(1, 0).key == "key-0002"
    real, failures = os.pread, [errno.ESTALE, errno.EIO]
    handles = []

    def failing(handle, size, start):
        if not os.readlink(f"/proc/self/fd/{handle}").endswith(".tar"):
            return real(handle, size, start)
        handles.append(handle)
        if failures:
            os.dup2(os.open("/dev/null", os.O_RDONLY), handle)  # later reads through this handle return nothing
            raise OSError(failures.pop(), "the storage fails")
        return real(handle, size, start)

    monkeypatch.setattr(os, "pread", failing)
    assert dataset.read(1, 1).key == "key-0003"
    assert len(handles) == 3 and caplog.text.count("the storage fails; retrying") == 1


def test_threads_share_open_shards(make_shards, make_image):
    """Evicted shards stay open while they are being read; every sample is correct and no file is left open."""
    dataset = open_dataset(str(make_shards([3] * 8).shards[0]).replace("00000", "*"), max_open=2)
    wanted = [(shard, sample) for shard in range(8) for sample in range(3)] * 30
    np.random.default_rng(0).shuffle(wanted)

    def check(place):
        shard, sample = place
        return dataset.read(shard, sample).image == make_image(3 * shard + sample)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(check, wanted))
    finally:
        sys.setswitchinterval(5e-3)
    folder = os.path.dirname(dataset.shards[0])
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    opened = [os.readlink(link) for link in links if os.path.lexists(link)]
    assert sum(target.startswith(folder) and target.endswith(".tar") for target in opened) <= 2


def test_fork_reads_while_another_thread_reads(make_shards, make_image):
    dataset = make_shards([3, 3])
    assert dataset.read(0, 0).image == make_image(0)
    _INHERITED.append(dataset)
    dataset.opened._lock.acquire()  # held by a thread that does not exist in the fork
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
            assert pool.submit(_read_inherited).result(20) == [make_image(1), make_image(4)]
    finally:
        dataset.opened._lock.release()
        _INHERITED.clear()


_INHERITED = []


def _read_inherited():
    return [_INHERITED[0].read(0, 1).image, _INHERITED[0].read(1, 1).image]
