"""Requests sent ahead for remote samples: the results are those of local reading, with fewer round trips."""

from __future__ import annotations

import asyncio
import math
import re
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import faulty_server
import object_store
from bifrost.data import (
    DataError,
    DataLost,
    Loader,
    LoaderSettings,
    Share,
    connections,
    open_dataset,
    read_ahead,
    retry,
    write_shard,
)
from bifrost.data import Plan as Order
from bifrost.data.remote import filesystem
from faulty_server import Plan, Rule


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(retry, "_sleep", lambda seconds: time.sleep(min(seconds, 0.02)))
    fsspec.filesystem("http").clear_instance_cache()
    yield
    fsspec.filesystem("http").clear_instance_cache()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_image) -> Path:
    """Five shards with 9, 1, 14, 6 and 10 samples of about 2 kB; number 12 does not decode."""
    folder, number = tmp_path_factory.mktemp("shards"), 0
    for shard, count in enumerate([9, 1, 14, 6, 10]):
        samples = []
        for _ in range(count):
            image = make_image(number)
            caption = f"caption {number}".encode()
            samples.append((f"key-{number:04d}", {"png": image[:900] if number == 12 else image, "txt": caption}))
            number += 1
        write_shard(folder / f"s-{shard:05d}.tar", samples)
    return folder


NAMES = "s-{00000..00004}.tar"


def hashes(items):
    return {"read": [(item.epoch, item.index, item.key, item.caption, item.image.tobytes()) for item in items]}


def loader(spec, share=(0, 1, 8, 4), steps=6, window=2, seed=0, workers=0) -> Loader:
    dataset = open_dataset(str(spec))
    order = Order(dataset.samples_per_shard, seed, window)
    return Loader(dataset, order, hashes, Share(*share), range(steps), LoaderSettings((8,), workers))


def read(*arguments, **options) -> list:
    made = loader(*arguments, **options)
    batches = [(batch.arrays["read"], batch.keys, batch.replaced, batch.names) for batch in made]
    made.close()
    return batches


def collect(made: Loader, keys: list) -> None:
    for batch in made:
        keys.append(batch.keys)


def bytes_of(dataset, index: int) -> int:
    return sum(size for _, size in dataset.spans(*dataset.place(index)))


def tars(plan: Plan) -> list[tuple[str, int, int]]:
    """Path, first and last byte of every request for a shard."""
    found = [(path, re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "")) for _, path, asked in plan.asked]
    return [(path, int(part[1]), int(part[2])) for path, part in found if part and path.endswith(".tar")]


@contextmanager
def counted(answer, plan=None):
    """Serve the responses of `answer` slowly; yields address, plan and [requests at once, the most so far]."""
    lock, running = threading.Lock(), [0, 0]

    def slow(handler, sent, fault):
        tar = handler.path.endswith(".tar") and handler.command == "GET"
        with lock:
            running[0] += tar
            running[1] = max(running)
        time.sleep(0.02)
        try:
            return answer(handler, sent, fault)
        finally:
            with lock:
                running[0] -= tar

    with faulty_server.serving(slow, plan) as (address, plan):
        yield address, plan, running


@pytest.fixture(scope="module")
def web(folder):
    with faulty_server.serving(folder) as (address, plan):
        yield address, plan


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_local_reading(folder, web, data) -> None:
    """For any plan and share, and with limits so small that they are reached all the time."""
    ranks, micro_batch, accumulation = (data.draw(st.integers(1, most)) for most in (3, 5, 2))
    share = (data.draw(st.integers(0, ranks - 1)), ranks, ranks * micro_batch * accumulation, micro_batch)
    window, seed, steps = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 9)), data.draw(st.integers(1, 8))
    limits = {
        "AHEAD_BYTES": data.draw(st.sampled_from([1, 5_000, 20_000, 64 << 20])),
        "FIRST_BYTES": data.draw(st.sampled_from([1, 5_000, 4 << 20])),
        "AHEAD_SAMPLES": data.draw(st.sampled_from([1, 7, 4096])),
        "GAP": data.draw(st.sampled_from([0, 4_000, 64 << 10])),
        "LONGEST_RANGE": data.draw(st.sampled_from([1, 10_000, 4 << 20])),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(read_ahead, name, value)
        patch.setattr(connections, "CONNECTIONS", data.draw(st.sampled_from([1, 3, 32])))
        found = read(f"{web[0]}/{NAMES}", share, steps, window, seed)
    assert found == read(folder / NAMES, share, steps, window, seed)


def test_many_requests_wait_for_the_network_at_once(folder, monkeypatch) -> None:
    monkeypatch.setattr(read_ahead, "LONGEST_RANGE", 1)
    with counted(faulty_server._folder(folder)) as (address, plan, running):
        read(f"{address}/{NAMES}", steps=5)
        assert 10 < running[1] <= connections.CONNECTIONS
        assert len(tars(plan)) == 41, "one of each sample, and the one that replaces the broken one"


def test_s3(folder, monkeypatch) -> None:
    """As many requests at once, more than botocore's default of ten connections."""
    import s3fs

    monkeypatch.setattr(read_ahead, "LONGEST_RANGE", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    with object_store.serving() as moto, counted(faulty_server._proxy(*moto[len("http://") :].split(":"))) as found:
        address, _, running = found
        object_store.fill(moto, "bucket", folder)
        for name, value in object_store.environment(address).items():
            monkeypatch.setenv(name, value)
        assert read(f"s3://bucket/{NAMES}", steps=8) == read(folder / NAMES, steps=8)
        assert 10 < running[1] <= connections.CONNECTIONS
    s3fs.S3FileSystem.clear_instance_cache()


def test_neighbouring_samples_are_requested_together_and_once(folder) -> None:
    """An epoch of 40 samples takes one request per shard and index, and one for the neighbour of the broken one."""
    with faulty_server.serving(folder) as (address, plan):
        made = loader(f"{address}/{NAMES}", steps=5)
        plan.asked.clear()
        list(made)
        expected = Counter(f"/s-{number:05d}.{kind}" for number in range(5) for kind in ("tar", "index.jsonl"))
        assert Counter(path for _, path, _ in plan.asked) == expected + Counter(["/s-00002.tar"])


def test_gaps_are_at_most_as_long_as_the_samples(folder) -> None:
    """A rank of four needs a quarter of the samples: it does not request whole shards."""
    with faulty_server.serving(folder) as (address, plan):
        made = loader(f"{address}/{NAMES}", (0, 4, 8, 2), 5, window=5)
        plan.asked.clear()
        read = [index for batch in made for _, index, *_ in batch.arrays["read"]]
        dataset = open_dataset(str(folder / NAMES))
        needed = sum(bytes_of(dataset, index) for index in read)
        assert needed <= sum(last + 1 - first for _, first, last in tars(plan)) <= 2 * needed


@pytest.mark.parametrize("fault", faulty_server.FAULTS)
def test_faults_do_not_change_what_is_read(folder, fault) -> None:
    expected = read(folder / NAMES)
    plan = Plan()
    with faulty_server.serving(folder, plan) as (address, _):
        made = loader(f"{address}/{NAMES}")
        plan.rules += [Rule(fault, f"s-0000{n}.{kind}", 2) for n in (0, 2) for kind in ("tar", "index")]
        found = [(batch.arrays["read"], batch.keys, batch.replaced, batch.names) for batch in made]
        assert found == expected and plan.fired[fault] >= 4


def test_random_faults_with_workers(folder) -> None:
    expected = read(folder / NAMES, steps=8)
    plan = Plan(chance=0.2, seed=1)
    with faulty_server.serving(folder, plan) as (address, _):
        assert read(f"{address}/{NAMES}", steps=8, workers=2) == expected
        assert plan.fired


def test_a_server_with_few_connections_is_not_asked_for_more(folder, monkeypatch) -> None:
    """Above four requests at once it answers 503: the limit is learned, and every sample is read."""
    monkeypatch.setattr(retry, "_sleep", lambda seconds: time.sleep(min(seconds, 0.3)))  # requests under way end
    monkeypatch.setattr(read_ahead, "LONGEST_RANGE", 1)
    plan = Plan()
    with counted(faulty_server._folder(folder), plan) as (address, _, running):
        plan.next = lambda method, path, asked: "503" if running[0] >= 4 and path.endswith(".tar") else None
        refused, answer = [], faulty_server._Handler._answer

        def noted(handler, status, *rest, **options):
            refused.append(status == 503)
            answer(handler, status, *rest, **options)

        monkeypatch.setattr(faulty_server._Handler, "_answer", noted)
        assert read(f"{address}/{NAMES}", steps=15) == read(folder / NAMES, steps=15)
        assert 0 < sum(refused) <= 2 * connections.CONNECTIONS


def test_server_without_ranges_sends_each_shard_once(folder) -> None:
    plan = Plan(ranges=False)
    with faulty_server.serving(folder, plan) as (address, _):
        made = loader(f"{address}/{NAMES}", steps=10)
        plan.asked.clear()
        assert [batch.keys for batch in made] == [keys for _, keys, *_ in read(folder / NAMES, steps=10)]
        assert Counter(path for method, path, _ in plan.asked if path.endswith(".tar")) == Counter(
            f"/s-{number:05d}.tar" for number in range(5)
        )


def test_memory_is_bounded(folder, monkeypatch) -> None:
    """Requested are at most the used bytes, the limit, a sample more, and per epoch the broken one's neighbour."""
    limit = 20_000
    monkeypatch.setattr(read_ahead, "GAP", 0)
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", limit)
    monkeypatch.setattr(read_ahead, "FIRST_BYTES", limit)
    dataset = open_dataset(str(folder / NAMES))
    with faulty_server.serving(folder) as (address, plan):
        used, asked = 0, []
        for batch in loader(f"{address}/{NAMES}", steps=15, window=5):
            used += sum(bytes_of(dataset, index) for _, index, *_ in batch.arrays["read"])
            time.sleep(0.01)
            asked.append(sum(last + 1 - first for _, first, last in tars(plan)))
            assert asked[-1] <= used + limit + 4 * 3000
        assert max(np.diff(asked)) > limit / 3, "several micro-batches are requested together"


@pytest.mark.parametrize(
    ("fault", "lost", "message"),
    [
        ("404", True, "cannot be read any more"),
        ("503", True, "check the storage or the network; another attempt may succeed"),
        ("403", False, "check the permissions, or your credentials"),
        ("wrong-range", False, "received bytes .*; check the address, and the server"),
    ],
)
def test_an_error_is_raised_at_its_sample(folder, fault, lost, message) -> None:
    """A shard that disappears ends the run when its first sample is needed, not when it is requested."""
    expected = [keys for _, keys, *_ in read(folder / NAMES, window=1, steps=5)]
    shards = Order(open_dataset(str(folder / NAMES)).samples_per_shard, 0, 1).locate(np.arange(40)).shard.tolist()
    last, before = f"s-{shards[-1]:05d}.tar", shards.index(shards[-1]) // 4
    plan, got = Plan(), []
    with faulty_server.serving(folder, plan) as (address, _):
        made = loader(f"{address}/{NAMES}", window=1, steps=5)
        plan.rules.append(Rule(fault, last, math.inf))
        with pytest.raises(DataError, match=f"rank 0: .*{last}.*{message}") as caught:
            collect(made, got)
    assert isinstance(caught.value, DataLost) == lost
    assert before > 3 and got == expected[:before]


def test_replaced_shard_is_detected(folder, tmp_path, monkeypatch) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(read_ahead, "AHEAD_SAMPLES", 2)
    with faulty_server.serving(tmp_path) as (address, _):
        batches = iter(loader(f"{address}/{NAMES}", steps=10))
        next(batches)
        for file in tmp_path.glob("*.tar"):
            file.write_bytes(file.read_bytes()[:-512] + b"\1" * 512)
        with pytest.raises(DataError, match="was replaced while being read"):
            list(batches)


def test_close_leaves_nothing(folder) -> None:
    """Requests that hang for 20 s are cancelled, and no thread is left."""
    answer, hang = faulty_server._folder(folder), threading.Event()

    def hanging(handler, sent, fault):
        if handler.path.endswith("2.tar") and handler.command == "GET":
            hang.wait(20)
        return answer(handler, sent, fault)

    loop = filesystem("http://127.0.0.1")[0].loop
    threads = set(threading.enumerate())
    with faulty_server.serving(hanging) as (address, plan):
        made = loader(f"{address}/{NAMES}", steps=100, window=1, seed=4)
        batches = iter(made)
        while not any(path.endswith("2.tar") for path, *_ in tars(plan)):
            next(batches)
            time.sleep(0.01)
        assert asyncio.all_tasks(loop)
        began = time.monotonic()
        made.close()
        while asyncio.all_tasks(loop):
            assert time.monotonic() < began + 10
            time.sleep(0.01)
        hang.set()
    mine = [each for each in threading.enumerate() if each not in threads and "process_request" not in each.name]
    assert not mine


def test_a_fork_makes_its_own_requests(folder, web) -> None:
    made = loader(f"{web[0]}/{NAMES}")
    next(iter(made))
    _INHERITED.append(made._source.dataset)
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        found = pool.submit(_read_inherited).result(20)
    _INHERITED.clear()
    made.close()
    assert found == open_dataset(str(folder / NAMES)).read(2, 0)


_INHERITED: list = []


def _read_inherited():
    return _INHERITED[0].read(2, 0)
