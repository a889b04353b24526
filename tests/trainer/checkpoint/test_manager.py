"""Saves in the background, on ranks that are threads: what is written, what a failing disk does, who waits for what."""

import errno
import os
import threading
import time

import pytest
import torch

from bifrost.recipes.schema import Checkpoint
from bifrost.trainer.checkpoint import manager as saver_module
from bifrost.trainer.checkpoint import shard as part_module
from bifrost.trainer.checkpoint.manager import CheckpointManager
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.distributed.process_group import Group
from bifrost.trainer.errors import RunError, Unhealthy

SHAPES = {"layer.weight": (5, 3), "layer.bias": (3,), "scale": (), "empty": (0, 4)}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(saver_module, "RETRY_S", 0.01)


@pytest.fixture
def made(tmp_path):
    """A saver of one rank, its live values, and the events that it reported."""
    slots = {"master": {"a": torch.zeros(4)}, "ema": {"a": torch.zeros(4)}}
    events = []
    saver = CheckpointManager(Store(tmp_path), Checkpoint(every=10, keep=2), slots, events.append)

    def save(step):
        state = {"progress": {"step": step}}
        buffers = {"mean": torch.full((2,), float(step))}
        for slot in slots.values():
            slot["a"].fill_(step)
        saver.save(step, slots, {"a": (4,)}, state, buffers)
        # Training continues in the same memory.
        state["progress"]["step"] = -1
        buffers["mean"].fill_(-1)
        saver.await_copy()
        for slot in slots.values():
            slot["a"].fill_(-1)

    return saver, save, events


@pytest.fixture
def gate(monkeypatch):
    """A disk that takes nothing until the gate is set."""
    gate = threading.Event()
    real = part_module.write_file
    monkeypatch.setattr(part_module, "write_file", lambda *args: gate.wait(20) and real(*args))
    yield gate
    gate.set()


@pytest.fixture
def refuse(monkeypatch):
    """(rank, error) makes that rank's files fail from now on; (None) fixes the disk."""
    real = part_module.write_file
    failing = {}

    def write(path, parts):
        if path.name == failing.get("name"):
            raise failing["error"]
        return real(path, parts)

    monkeypatch.setattr(part_module, "write_file", write)

    def set_to(rank, error=None):
        failing["name"] = None if rank is None else f"rank-{rank:05d}.safetensors"
        failing["error"] = error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), failing["name"])

    return set_to


def assert_holds_step(reader, step):
    assert (reader.step, reader.state) == (step, {"progress": {"step": step}})
    for slot in ("master", "ema"):
        assert torch.equal(reader.full(slot, "a"), torch.full((4,), float(step)))
    assert torch.equal(reader.buffers()["mean"], torch.full((2,), float(step)))


def test_the_state_at_the_time_of_the_save_is_written(tmp_path, made, gate):
    saver, save, events = made
    save(10)
    assert events == []
    assert Store(tmp_path).steps() == []
    gate.set()
    saver.wait()
    assert_holds_step(Store(tmp_path).newest_verified(), 10)
    (event,) = events
    assert event["event"] == "checkpoint"
    assert event["bytes"] == sum(f.stat().st_size for f in Store(tmp_path).folder(10).glob("[!m]*"))  # no manifest
    assert event["gib_per_s"] == pytest.approx(event["bytes"] / 2**30 / event["seconds"])


def test_the_time_that_training_waits_is_counted(made, gate):
    saver, save, events = made
    save(10)
    time.sleep(0.3)
    gate.set()
    saver.wait()
    gate.clear()
    save(20)
    threading.Timer(0.3, gate.set).start()
    saver.wait()
    free, waited = events
    assert free["seconds"] > 0.3 > free["blocked_s"] + 0.1
    assert waited["seconds"] >= waited["blocked_s"] > 0.25


def test_one_save_at_a_time_with_one_warning(tmp_path, made, gate, caplog):
    saver, save, events = made
    save(10)
    for step in (20, 30):
        gate.clear()
        threading.Timer(0.1, gate.set).start()
        save(step)
        assert [event["step"] for event in events] == list(range(10, step, 10))
    saver.wait()
    assert len([r for r in caplog.records if "raise checkpoint.every (10)" in r.message]) == 1
    assert Store(tmp_path).steps() == [20, 30]  # pruned in the background
    assert events[0]["blocked_s"] > 0.05  # it was the first that the second one waited for


def test_a_full_disk_is_an_event_and_training_continues(tmp_path, made, refuse):
    saver, save, events = made
    refuse(0)
    for step in (10, 20):
        save(step)
        saver.wait()
        assert os.listdir(tmp_path) == []
    refuse(None)
    save(30)
    saver.wait()
    assert_holds_step(Store(tmp_path).newest_verified(), 30)
    assert [(e["event"], e["step"], e.get("consecutive_failures")) for e in events] == [
        ("save_failed", 10, 1),
        ("save_failed", 20, 2),
        ("checkpoint", 30, None),
    ]
    assert "rank 0 could not write the checkpoint" in events[0]["reason"]
    assert "No space left on device; free disk space" in events[0]["reason"]
    refuse(0)
    save(40)
    saver.wait()
    assert events[-1]["consecutive_failures"] == 1  # in a row, since the last that worked
    assert Store(tmp_path).steps() == [30]


def test_consecutive_failed_saves_end_the_run_at_once(made, refuse):
    _, save, events = made
    refuse(0)
    save(10)
    save(20)
    with pytest.raises(Unhealthy, match=r"3 saves in a row failed, the last at step 30: rank 0 .* No space left"):
        save(30)
    assert [event["consecutive_failures"] for event in events] == [1, 2, 3]


def test_the_last_save_is_retried(tmp_path, made, refuse):
    saver, save, events = made
    refuse(0)
    saver._report = lambda event: (events.append(event), refuse(None))
    save(10)
    saver.finish()
    assert [event["event"] for event in events] == ["save_failed", "checkpoint"]
    assert_holds_step(Store(tmp_path).newest_verified(), 10)


def test_a_last_save_that_never_succeeds_is_reported(made, refuse):
    saver, save, events = made
    refuse(0)
    save(10)
    with pytest.raises(Unhealthy, match="3 saves in a row"):
        saver.finish()
    assert len(events) == 3


def test_other_errors_end_the_run_at_the_next_save(made, refuse):
    _, save, _ = made
    refuse(0, ZeroDivisionError("a bug"))
    save(10)
    with pytest.raises(RunError, match="rank 0 could not write the checkpoint: a bug"):
        save(20)


def test_a_purge_that_fails_ends_nothing(tmp_path, made, monkeypatch, caplog):
    saver, save, _ = made
    monkeypatch.setattr(Store, "prune", lambda *_: 1 / 0)
    for step in (10, 20):
        save(step)
    saver.finish()
    assert "old checkpoints could not be removed, training continues" in caplog.text
    assert Store(tmp_path).steps() == [10, 20]


def test_a_run_that_failed_waits_a_while_only(made, gate):
    saver, save, events = made
    save(10)
    begun = time.monotonic()
    saver.abandon(0.1)
    assert 0.1 <= time.monotonic() - begun < 10
    gate.set()
    saver.abandon(20)
    assert [event["step"] for event in events] == [10]


def test_one_ranks_full_disk_is_every_ranks_failed_save(tmp_path, run_ranks, slices, refuse):
    """Ranks save steps 1 to 4; rank 1's disk is full at 2 and from 4 on, of which two in a row end the run."""
    at_step = threading.Barrier(2, timeout=20)

    def work(rank, gather):
        events = []
        held = slices(rank, 2)
        settings = Checkpoint(max_failed_saves=2)
        saver = CheckpointManager(Store(tmp_path), settings, held, events.append, Group(rank, 2, gather))
        for step in (1, 2, 3, 4):
            at_step.wait()
            refuse(1 if step in (2, 4) else None)
            at_step.wait()
            saver.save(step, held, SHAPES, {}, {})
            saver.wait()
        with pytest.raises(Unhealthy):
            saver.finish()
        return [(event["event"], event["step"], event.get("reason")) for event in events]

    one, other = run_ranks(2, work)
    assert one == other
    assert [entry[:2] for entry in one] == [
        ("checkpoint", 1),
        ("save_failed", 2),
        ("checkpoint", 3),
        ("save_failed", 4),
        ("save_failed", 4),
    ]
    assert all("rank 1 could not write" in entry[2] for entry in one if entry[0] == "save_failed")
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000003"]


def test_a_bug_on_one_rank_outweighs_a_full_disk_on_another(tmp_path, run_ranks, slices, refuse):
    refuse(0)

    def work(rank, gather):
        held = slices(rank, 2)
        if rank == 1:
            held["master"] = {}
        saver = CheckpointManager(Store(tmp_path), Checkpoint(), held, print, Group(rank, 2, gather))
        saver.save(1, held, SHAPES, {}, {})
        saver.wait()

    errors = run_ranks(2, work)
    assert all(type(error) is RunError for error in errors), errors
    assert "rank 1 could not write the checkpoint: slot master" in str(errors[0])
