"""A save that is killed at any of its system calls leaves the previous checkpoint or the new one, whole."""

import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch

import boundaries
from bifrost.recipes.schema import Checkpoint
from bifrost.trainer.checkpoint.local import LocalParts
from bifrost.trainer.checkpoint.manager import CheckpointManager
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.distributed.process_group import Group

SHAPES = {"layer.weight": (5, 3), "layer.bias": (3,), "scale": (), "empty": (0, 4)}


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where there is such a folder: hundreds of deaths sync dozens of files each, and no power fails here."""
    if os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            yield Path(name)
    else:
        yield tmp_path


def die_at(fatal, work):
    """Run `work` in a forked child that dies at its `fatal`-th boundary; whether it survived."""
    child = os.fork()
    if child == 0:  # no exception may reach pytest, which this process is a copy of
        code = 1
        try:
            boundaries.die_at(fatal)
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def deaths(folder, prepare, work):
    """Each k in turn: a fresh folder, `prepare` it, die at boundary k of `work`; yields (k, folder)."""
    for fatal in range(1000):
        place = folder / str(fatal)
        prepare(place)
        survived = die_at(fatal, lambda place=place: work(place))
        yield fatal, place
        if survived:
            return
    pytest.fail("the child never survived")


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_save(tmp_path, save, assert_holds, ranks):
    found = []
    for _, place in deaths(tmp_path, lambda p: save(p, 1, ranks=ranks), lambda p: save(p, 2, ranks=ranks)):
        store = Store(place)
        assert all(store.verify(step) == [] for step in store.steps())  # what has its name is whole
        reader = store.newest_verified()
        assert_holds(reader, reader.step)
        found.append(reader.step)
        assert save(place, 3, ranks=ranks) == [None] * ranks
        assert_holds(Store(place).newest_verified(), 3)
        assert not list(place.glob(".*"))
    assert ranks > 1 or found == sorted(found)  # the new one appears at one moment, the rename; ranks interleave
    assert set(found) == {1, 2}
    assert len(found) > 20


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "local"), [(1, False), (2, False), (2, True)])
def test_killed_while_training_continues(tmp_path, run_ranks, slices, assert_holds, ranks, local):
    """As above, by the background writer: step 2 with what it removes, while the values in memory change already.

    Each rank is a node where saves go to the nodes' own disks first, and a start brings what is whole there."""

    def near(place, rank, gather):
        return LocalParts(place / f"node-{rank}", Store(place), "run", rank, gather) if local else None

    def work(place):
        def train(rank, gather):
            live = slices(rank, ranks)
            parts = near(place, rank, gather)
            saver = CheckpointManager(
                Store(place), Checkpoint(keep=1), live, lambda event: None, Group(rank, ranks, gather), parts
            )
            for step in (1, 2):
                for slot, values in slices(rank, ranks, seed=step).items():
                    for name, value in values.items():
                        live[slot][name].copy_(value)
                mean = torch.ones(2) * step
                saver.save(step, live, SHAPES, {"seed": step}, {"mean": mean})
                saver.await_copy()
                for tensor in [mean, *(tensor for values in live.values() for tensor in values.values())]:
                    tensor.fill_(-1)
            saver.finish()

        assert run_ranks(ranks, train) == [None] * ranks

    found, recovered = [], set()
    for _, place in deaths(tmp_path, lambda place: None, work):
        store = Store(place)
        assert all(store.verify(step) == [] for step in store.steps())
        if local:

            def recover(rank, gather, place=place):
                return near(place, rank, gather).recover(Store(place), gather)

            recovered.update(run_ranks(ranks, recover))
            assert not list(place.glob("node-*/*"))
        reader = store.newest_verified()
        if reader:
            assert_holds(reader, reader.step)
        found.append(reader.step if reader else 0)
    assert ranks > 1 or found == sorted(found)
    assert set(found) == {0, 1, 2}
    assert len(found) > 40
    assert [path.name for path in place.glob("*step-*")] == ["step-00000002"]
    assert recovered == ({None, 1, 2} if local else set())


def test_killed_save_in_place_of_a_damaged_one(tmp_path, save, assert_holds):
    def prepare(place):
        save(place, 1)
        save(place, 2)
        (place / "step-00000002" / "state.json").write_text("{}")

    found = []
    for _, place in deaths(tmp_path, prepare, lambda p: save(p, 2)):
        reader = Store(place).newest_verified()
        assert_holds(reader, reader.step)
        found.append(reader.step)
        assert save(place, 2) == [None]
        assert_holds(Store(place).newest_verified(), 2)
    assert set(found) == {1, 2}


def test_killed_prune(tmp_path, save, assert_holds):
    def prepare(place):
        for step in (1, 2, 3):
            save(place, step)

    for _, place in deaths(tmp_path, prepare, lambda p: Store(p).prune(1)):
        store = Store(place)
        for step in store.steps():
            assert store.verify(step) == []  # what still has its name is whole
        assert_holds(store.newest_verified(), 3)
        assert save(place, 4) == [None]
        assert not list(place.glob(".*"))


def test_killed_first_save(tmp_path, save, assert_holds):
    for _, place in deaths(tmp_path, lambda p: None, lambda p: save(p, 1)):
        reader = Store(place).newest_verified()
        if reader:
            assert_holds(reader, 1)
        assert save(place, 2) == [None]
