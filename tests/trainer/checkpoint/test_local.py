"""Saves that go to the nodes' own disks first: each rank here is a node with a folder of its own."""

import errno
import os
import shutil
import threading

import pytest
import torch

from bifrost.recipes.schema import Checkpoint
from bifrost.trainer.checkpoint import local as local_module
from bifrost.trainer.checkpoint import shard as part_module
from bifrost.trainer.checkpoint.durable import Entry, Span
from bifrost.trainer.checkpoint.local import LocalParts
from bifrost.trainer.checkpoint.manager import CheckpointManager
from bifrost.trainer.checkpoint.manifest import Manifest, read_manifest
from bifrost.trainer.checkpoint.store import StorageError, Store
from bifrost.trainer.distributed.process_group import Group
from bifrost.trainer.errors import RunError

SHAPES = {"layer.weight": (5, 3), "layer.bias": (3,), "scale": (), "empty": (0, 4)}


@pytest.fixture
def broken(monkeypatch):
    """A set of folder names; no file can be written below them."""
    names = set()
    real = part_module.write_file

    def write(path, *content):
        if names & set(path.parts):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *content)

    monkeypatch.setattr(part_module, "write_file", write)
    monkeypatch.setattr(local_module, "write_file", write)
    return names


@pytest.fixture
def start(tmp_path, run_ranks, slices):
    """(steps, ranks) one start of the run on that many nodes: recover, save those steps, go; what each rank saw."""

    def run(steps, ranks=2, seed=None):
        def work(rank, gather):
            store = Store(tmp_path / "run" / "checkpoints")
            local = LocalParts(tmp_path / f"node-{rank}", store, "run", rank, gather)
            brought = local.recover(store, gather)
            events = []
            held = slices(rank, ranks)
            saver = CheckpointManager(
                store, Checkpoint(max_failed_saves=9), held, events.append, Group(rank, ranks, gather), local
            )
            for step in steps:
                made = slices(rank, ranks, seed or step)
                state, buffers = {"seed": seed or step}, {"mean": torch.ones(2) * (seed or step)}
                saver.save(step, made, SHAPES, state, buffers)
                saver.wait()
            return brought, events

        return run_ranks(ranks, work)

    return run


def parts(tmp_path):
    return sorted(path.name.partition(".")[0] for path in tmp_path.glob("node-*/run-*/*"))


def newest(tmp_path):
    return Store(tmp_path / "run" / "checkpoints").newest_verified()


def test_parts_go_when_the_shared_store_has_the_checkpoint(tmp_path, start, assert_holds):
    results = start([1, 2])
    assert parts(tmp_path) == []
    assert_holds(newest(tmp_path), 2)
    for _, events in results:
        assert all(0 < event["local_s"] <= event["seconds"] for event in events)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_restart_recovers_what_storage_refused(tmp_path, start, broken, assert_holds, ranks):
    start([1])
    broken.add("checkpoints")
    start([2, 3])
    assert parts(tmp_path) == ["step-00000003"] * 2  # the newest alone
    assert newest(tmp_path).step == 1
    broken.clear()
    results = start([], ranks)
    assert [brought for brought, _ in results] == [3] * ranks
    assert_holds(newest(tmp_path), 3)
    assert newest(tmp_path).ranks == 2
    assert parts(tmp_path) == []
    assert [brought for brought, _ in start([])] == [None, None]


def test_a_lost_node(tmp_path, start, broken, assert_holds, caplog):
    start([1])
    broken.add("checkpoints")
    start([2])
    broken.clear()
    shutil.rmtree(tmp_path / "node-1")
    assert start([])[0][0] is None
    assert "the nodes hold 1 of the 2 local parts of step 2: skipped" in caplog.text
    assert_holds(newest(tmp_path), 1)


@pytest.mark.parametrize(
    "file", ["rank-00000.safetensors", "state.json", "buffers.safetensors", "manifest.json", "rank-00001.safetensors"]
)
def test_a_flipped_byte_is_refused_by_name(tmp_path, start, broken, assert_holds, caplog, file):
    start([1])
    broken.add("checkpoints")
    start([2])
    broken.clear()
    (path, *_) = tmp_path.glob(f"node-*/run-*/step-*/{file}")
    sound = bytearray(path.read_bytes())
    sound[len(sound) // 2] ^= 1
    path.write_bytes(sound)
    assert start([])[0][0] is None
    assert f"{path.parent.name}/{file}: damaged" in caplog.text
    assert_holds(newest(tmp_path), 1)
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["local-id", "step-00000001"]


def test_parts_of_different_saves_of_a_step_do_not_mix(tmp_path, start, broken, assert_holds):
    start([1])
    broken.add("checkpoints")
    start([2], seed=7)
    shutil.move(tmp_path / "node-1", tmp_path / "aside")
    broken.clear()
    start([])
    broken.add("checkpoints")
    start([2], seed=8)
    # Node 0 has the second save's part, node 1 is back with that of the first.
    shutil.rmtree(tmp_path / "node-1")
    shutil.move(tmp_path / "aside", tmp_path / "node-1")
    broken.clear()
    assert start([])[0][0] is None
    assert_holds(newest(tmp_path), 1)


def test_a_new_run_finds_nothing(tmp_path, start, broken):
    broken.add("checkpoints")
    start([2])
    broken.clear()
    (tmp_path / "run").rename(tmp_path / "old")
    assert start([])[0][0] is None
    assert newest(tmp_path) is None


def test_a_local_disk_that_is_full_costs_nothing_but_itself(tmp_path, start, broken, assert_holds, caplog):
    broken.add("node-1")
    results = start([1, 2])
    assert_holds(newest(tmp_path), 2)
    assert parts(tmp_path) == []
    assert "no local copy of step 1, it goes to shared storage only: rank 1" in caplog.text
    assert all(event["event"] == "checkpoint" and "local_s" not in event for _, events in results for event in events)


def test_shared_storage_that_is_full_at_the_start_loses_nothing(tmp_path, start, broken, assert_holds):
    start([1])
    broken.add("checkpoints")
    start([2])
    errors = start([])
    assert all(isinstance(error, StorageError) for error in errors)
    assert len(parts(tmp_path)) == 2
    broken.clear()
    assert start([])[0][0] == 2
    assert_holds(newest(tmp_path), 2)


def test_a_stale_set_does_not_replace_a_newer_checkpoint(tmp_path, start, broken, monkeypatch):
    """Nodes that come back with a later step of an earlier time: the run has gone another way since."""
    start([1])
    broken.add("checkpoints")
    monkeypatch.setattr(local_module.time, "time", lambda: 1000.0)
    start([5])
    monkeypatch.undo()
    assert start([])[0][0] is None
    assert newest(tmp_path).step == 1


def test_no_thread_is_left(start):
    before = threading.active_count()
    start([1])
    assert threading.active_count() == before


@pytest.mark.parametrize("name", ["../stolen", "/tmp/stolen", "a/b", "..", "", "a\\b", "manifest.json", "line\nbreak"])
def test_a_manifest_that_names_a_file_outside_of_its_folder_is_refused(tmp_path, name):
    """Its own hash is right: whoever may write to the node's disk can make one."""
    files = {"rank-00000.safetensors": Entry(1, {"file": Span(0, 1, "xxh3_128:0")})}
    whole = Manifest(step=1, ranks=1, time=0.0, slots=["master"], shapes={}, files=files)
    whole.write(tmp_path)
    assert read_manifest(tmp_path) == whole
    # As `write` would write it, without the check of its making.
    Manifest.model_construct(**{**dict(whole), "files": {name: files["rank-00000.safetensors"]}}).write(tmp_path)
    with pytest.raises(RunError, match=r"manifest\.json: damaged, it is not a manifest$"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["../../home", "", "abc"])
def test_an_invalid_id_creates_no_folder(tmp_path, start, text):
    """The folder whose name is made of it is removed in the end."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "local-id").write_text(text)
    for raised in start([]):
        assert isinstance(raised, RunError) and "local-id: not the id of a run's local parts" in str(raised)
