from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from bifrost.data import (
    BadSamples,
    DataError,
    DataLost,
    Loader,
    LoaderSettings,
    Plan,
    Share,
    open_dataset,
    worker_failure,
    write_shard,
)

SIZE = 8


def collate(items):
    return {
        "image": torch.from_numpy(np.stack([item.image for item in items])),
        "index": torch.tensor([item.index for item in items]),
        "epoch": torch.tensor([item.epoch for item in items]),
        "caption": torch.tensor([int(item.caption.rpartition(" ")[2]) for item in items]),
    }


def slow_collate(items):
    time.sleep(0.05)
    return collate(items)


def make_loader(dataset, rank=0, ranks=1, global_batch=24, micro_batch=2, steps=(0, 4), made_by=collate, **options):
    plan = Plan(dataset.samples_per_shard, seed=3, shuffle_window=2)
    return Loader(
        dataset,
        plan,
        made_by,
        Share(rank, ranks, global_batch, micro_batch),
        range(*steps),
        LoaderSettings((SIZE,), **options),
    )


@pytest.fixture(autouse=True)
def others() -> None:
    """Processes of earlier tests of the session, such as a fork server, which are ignored."""
    OTHERS.clear()
    OTHERS.update(psutil.Process().children(recursive=True))


OTHERS: set[psutil.Process] = set()


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child not in OTHERS]


def by_step(dataset, ranks, steps=(0, 4), **options):
    """(epoch, index, key) of all ranks per step, in the order of positions."""
    shares = []
    for rank in range(ranks):
        loader = make_loader(dataset, rank, ranks, steps=steps, **options)
        batches = list(loader)
        assert len(batches) == len(loader)
        rows = [list(zip(b.arrays["epoch"].tolist(), b.arrays["index"].tolist(), b.keys, strict=True)) for b in batches]
        accumulation = len(rows) // (steps[1] - steps[0])
        shares.append([rows[k : k + accumulation] for k in range(0, len(rows), accumulation)])
    return [
        [sample for row in zip(*(share[k] for share in shares), strict=True) for micro in row for sample in micro]
        for k in range(steps[1] - steps[0])
    ]


def test_sequence_is_independent_of_ranks_workers_and_resume(make_shards):
    dataset = make_shards([7, 5, 9, 4, 6])  # 31 samples, so that 4 steps of 24 span epochs
    expected = by_step(dataset, 1)
    located = Plan(dataset.samples_per_shard, seed=3, shuffle_window=2).locate(np.arange(4 * 24))
    assert [s[:2] for step in expected for s in step] == list(
        zip(located.epoch.tolist(), located.index.tolist(), strict=True)
    )
    assert [key for step in expected for _, _, key in step] == [f"key-{i:04d}" for i in located.index]
    for ranks in (2, 3, 4, 12):
        assert by_step(dataset, ranks) == expected
    for workers in (1, 2):
        assert by_step(dataset, 2, workers=workers, prefetch=1 + workers) == expected
    assert by_step(dataset, 3, micro_batch=4) == expected
    for start in (1, 3):
        assert by_step(dataset, 4, steps=(start, 4), workers=start - 1) == expected[start:]


def test_batches_match_the_shards(make_shards):
    dataset = make_shards([4, 4])
    for batch in make_loader(dataset, global_batch=8, micro_batch=4, steps=(0, 1)):
        assert batch.arrays["image"].shape == (4, SIZE, SIZE, 3)
        assert batch.arrays["image"].dtype == torch.uint8
        assert batch.arrays["caption"].tolist() == batch.arrays["index"].tolist()
        assert batch.keys == [f"key-{i:04d}" for i in batch.arrays["index"].tolist()]
        assert batch.replaced == []


def test_bad_sample_is_replaced_by_its_neighbour(make_shards):
    broken = {1, 2, 6, 7, 8, 9}  # two in the middle of shard 0 and all of shard 1
    dataset = make_shards([6, 4, 5], broken)
    instead = {1: 3, 2: 3, 6: 10, 7: 10, 8: 10, 9: 10}
    seen = []
    for workers in (0, 1, 2):
        batches = list(make_loader(dataset, global_batch=15, micro_batch=3, steps=(0, 2), workers=workers))
        seen.append([(b.arrays["index"].tolist(), b.keys, b.replaced) for b in batches])
        for batch in batches:
            planned = batch.arrays["index"].tolist()
            assert batch.keys == [f"key-{instead.get(i, i):04d}" for i in planned]
            assert batch.arrays["caption"].tolist() == [instead.get(i, i) for i in planned]
            assert [key for key, _ in batch.replaced] == [f"key-{i:04d}" for i in planned if i in broken]
            assert all("decode" in reason for _, reason in batch.replaced)
        assert sorted(i for b in batches for i in b.arrays["index"].tolist()) == sorted([*range(15)] * 2)
    assert seen[0] == seen[1] == seen[2]


def test_replacement_wraps_around(make_shards):
    dataset = make_shards([3, 3], {2, 3, 4, 5})
    instead = {2: 0, 3: 0, 4: 0, 5: 0}  # wraps within shard 0; the first shard follows the last
    for batch in make_loader(dataset, global_batch=6, micro_batch=6, steps=(0, 1)):
        assert batch.keys == [f"key-{instead.get(i, i):04d}" for i in batch.arrays["index"].tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_readable_sample_is_a_one_line_error(make_shards, workers):
    dataset = make_shards([3, 3], set(range(6)))
    with pytest.raises(DataError, match="no sample of the dataset is readable, the first: key-000") as caught:
        list(make_loader(dataset, global_batch=6, workers=workers))
    assert "\n" not in str(caught.value)
    assert children() == []


def test_workers_ignore_stop_signals(make_shards):
    dataset = make_shards([20, 20])
    expected = [b.keys for b in make_loader(dataset, steps=(0, 8))]
    loader = make_loader(dataset, steps=(0, 8), workers=2, made_by=slow_collate)
    got = []
    for number, batch in enumerate(loader):
        got.append(batch.keys)
        if number in (0, 7):  # the first reaches workers that have just started
            for child in children():
                for stop in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                    child.send_signal(stop)
    assert got == expected
    assert children() == []


def test_signal_handlers_and_random_state_of_the_caller_are_kept(make_shards):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    state = torch.random.get_rng_state()
    list(make_loader(make_shards([20, 20]), workers=2))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dead_worker_is_named_in_the_error(make_shards):
    loader = make_loader(make_shards([20, 20]), steps=(0, 50), workers=2, made_by=slow_collate)
    started = time.monotonic()
    with pytest.raises((DataError, RuntimeError), match="DataLoader worker") as caught:  # noqa: PT012
        for number, _ in enumerate(loader):
            if number == 3:
                victim = children()[0].pid
                os.kill(victim, signal.SIGKILL)
    assert str(victim) in str(caught.value)
    assert time.monotonic() - started < 15
    loader.close()
    psutil.wait_procs(children(), timeout=10)
    assert children() == []


def hang(items):
    if items[0].epoch > 0:
        time.sleep(600)
    return collate(items)


def test_close_kills_unresponsive_workers(make_shards):
    loader = make_loader(make_shards([2]), steps=(0, 9), workers=2, made_by=hang)
    batches = iter(loader)
    next(batches)
    time.sleep(0.5)
    assert len(children()) == 2
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 5
    loader.close()
    assert children() == []


def test_early_exit_ends_workers_and_a_new_loop_restarts(make_shards):
    loader = make_loader(make_shards([24]), workers=2)
    first = []
    for batch in loader:
        first.append(batch.keys)
        if len(first) == 3:
            break
    assert [batch.keys for batch, _ in zip(loader, range(3), strict=False)] == first
    loader.close()
    assert children() == []


SCRIPT = """
import sys, time, torch
from bifrost.data import Loader, LoaderSettings, Share, Plan, open_dataset
dataset = open_dataset(sys.argv[1])
plan = Plan(dataset.samples_per_shard, 0)
def collate(items, calls=[]):
    calls.append(0)
    time.sleep(600 * (len(calls) > 1))  # each worker hangs in its second micro-batch
    return {}
loader = Loader(dataset, plan, collate, Share(0, 1, 4, 4), range(10**6), LoaderSettings((8,), workers=2))
batches = iter(loader)
next(batches)
import psutil
print(*(child.pid for child in psutil.Process().children()), flush=True)
exec(sys.argv[2])
"""


@pytest.mark.parametrize(
    ("end", "code"), [("while True: next(batches)", -9), ("raise SystemExit(3)", 3), ("raise ValueError", 1)]
)
def test_workers_end_with_the_main_process(make_shards, tmp_path, end, code):
    make_shards([8])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "s-*.tar"), end], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    if code == -9:
        process.kill()
    assert process.wait(timeout=20) == code
    deadline = time.monotonic() + 5
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline, "workers are left"
        time.sleep(0.05)


def test_plan_for_other_shards_is_refused(make_shards):
    dataset = make_shards([4, 4])
    with pytest.raises(DataError, match="made for other shards"):
        Loader(dataset, Plan([8], 0), collate, Share(0, 1, 4, 4), range(1), LoaderSettings((8,)))


def test_vanished_shard_is_named(make_shards, tmp_path):
    dataset = make_shards([4, 4])
    (tmp_path / "s-00001.tar").unlink()
    with pytest.raises(DataLost, match=r"rank 0: .*s-00001\.tar: cannot be read any more"):
        list(make_loader(dataset, global_batch=8, workers=1))


def test_run_stops_above_the_largest_fraction_of_bad_samples():
    ledger = BadSamples(0.05)
    ledger.add([("a", "cut"), ("b", "cut")], 8)  # a quarter, but only of eight
    ledger.add([], 91)
    ledger.add([("c", "cut")], 1)
    assert (ledger.bad, ledger.seen) == (3, 100)
    with pytest.raises(DataError, match=r"6 of 110 .*max_bad_fraction 0\.05: 3 like a \(cut\), 3 like d \(no\);") as e:
        ledger.add([("d", "no"), ("e", "no"), ("f", "no")], 10)
    assert "\n" not in str(e.value)
    many = [(str(i), f"ends at byte {i}") for i in range(90)] + [(kind, kind) for kind in "xyz"]
    with pytest.raises(DataError, match=r"90 like 0 \(ends at byte 0\), 1 like x \(x\), 1 like y \(y\), and 1 more;"):
        BadSamples(0.5).add(many, 100)
    BadSamples(0).add([], 1000)


def test_the_remedy_for_unreadable_samples_makes_readable_shards(make_shards, tmp_path):
    from bifrost.data.ingest import ingest

    (batch,) = make_loader(make_shards([6, 6], {1, 2, 8}), global_batch=12, micro_batch=12, steps=(0, 1))
    with pytest.raises(DataError, match="them, for a new run, with `bifrost data ingest SHARDS NEW`"):
        BadSamples(0).add(batch.replaced, 100)
    assert ingest(str(tmp_path / "*.tar"), tmp_path / "new", processes=1) == (1, 9, 3)
    (batch,) = make_loader(open_dataset(str(tmp_path / "new")), global_batch=9, micro_batch=9, steps=(0, 1))
    assert not batch.replaced and len(set(batch.keys)) == 9


def test_many_open_shards_do_not_thrash(tmp_path, make_image):
    for shard in range(6):
        write_shard(tmp_path / f"w-{shard}.tar", [(f"{shard}", {"png": make_image(shard), "txt": b"x 0"})])
    dataset = open_dataset(str(tmp_path / "w-*.tar"), max_open=1)
    make_loader(dataset, global_batch=6)
    assert dataset.opened.max_open == 4, "two blocks"


@pytest.mark.parametrize(
    ("text", "kind", "line"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", DataLost, "look for out-of-memory kills"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", DataLost, "look for out-of-memory kills"),
        ("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ", DataError, "fault; set data"),
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out"
            " of shared memory. Please try to raise your shared memory limit.",
            DataError,
            "enlarge /dev/shm",
        ),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
            "RuntimeError: unable to write to file </torch_12_34_0>: No space left on device (28)\n",
            DataError,
            r"unable to write to file </torch_12_34_0>: No space left on device \(28\)\); enlarge /dev/shm",
        ),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
            "RuntimeError: stack expects each tensor to be equal size\n",
            DataError,
            "a loader worker failed: RuntimeError: stack expects each tensor to be equal size; its traceback",
        ),
    ],
)
def test_worker_failures_are_classified(text, kind, line, caplog):
    found = worker_failure(RuntimeError(text), 3)
    assert type(found) is kind and re.match(f"rank 3: .*{line}", str(found)) and "\n" not in str(found)
    assert ("Original Traceback" in caplog.text) == ("failed:" in str(found))


def test_unrelated_errors_are_not_worker_failures():
    assert worker_failure(DataLost("rank 0: DataLoader worker (pid 7) is killed by signal: Killed"), 0) is None
    assert worker_failure(RuntimeError("CUDA out of memory"), 0) is None
    assert worker_failure(ValueError("x"), 0) is None


class Failing:
    """A collate function that fails in the worker."""

    def __init__(self, error):
        self.error = error

    def __call__(self, items):
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (RuntimeError("shapes differ"), DataError, "rank 0: a loader worker failed: RuntimeError: shapes differ"),
        (KeyError("column"), DataError, "rank 0: a loader worker failed: KeyError: 'column'"),
        (OSError(errno.ESTALE, "Stale file handle"), DataLost, "rank 0: a loader worker: Stale file handle; check the"),
        (OSError(errno.EMFILE, "Too many open files"), DataError, "raise the limit of open files"),
    ],
)
def test_error_raised_in_a_worker_reaches_the_caller(make_shards, error, kind, line):
    loader = make_loader(make_shards([4]), made_by=Failing(error), global_batch=2, steps=(0, 1), workers=1)
    with pytest.raises(DataError, match=line) as caught:
        list(loader)
    assert type(caught.value) is kind
