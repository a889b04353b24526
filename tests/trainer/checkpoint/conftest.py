"""A tiny checkpoint and ranks that run as threads."""

import threading

import pytest
import torch

from bifrost.trainer.checkpoint.layout import local_range
from bifrost.trainer.checkpoint.shard import Payload
from bifrost.trainer.checkpoint.store import Store

SHAPES = {"layer.weight": (5, 3), "layer.bias": (3,), "scale": (), "empty": (0, 4)}
SLOTS = ("master", "exp_avg")


@pytest.fixture(scope="session")
def whole():
    """(seed) -> slot -> name -> the whole parameter in its shape."""

    def make(seed=0):
        generator = torch.Generator().manual_seed(seed)
        return {slot: {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for slot in SLOTS}

    return make


class Ranks:
    """`ranks` threads and their all-gather, which keeps rank order and fails when a rank stays away."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.barrier = threading.Barrier(ranks, timeout=20)
        self.box = [None] * ranks

    def run(self, work):
        """work(rank, gather) on every rank; returns results, exceptions included as values."""
        results = [None] * self.ranks

        def body(rank):
            def gather(value):
                self.box[rank] = value
                self.barrier.wait()
                values = list(self.box)
                self.barrier.wait()
                return values

            try:
                results[rank] = work(rank, gather)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture(scope="session")
def run_ranks():
    return lambda ranks, work: Ranks(ranks).run(work)


@pytest.fixture(scope="session")
def slices(whole):
    """(rank, ranks, seed) -> the slots that this rank holds."""

    def make(rank, ranks, seed=0):
        cut = {}
        for slot, parameters in whole(seed).items():
            cut[slot] = {n: t.flatten()[slice(*local_range(t.numel(), rank, ranks))] for n, t in parameters.items()}
        return cut

    return make


@pytest.fixture(scope="session")
def save(run_ranks, slices):
    """(folder, step, ranks, seed) saves on that many ranks and returns what each rank raised or None."""

    def run(folder, step, ranks=1, seed=None):
        seed = step if seed is None else seed

        def work(rank, gather):
            held = slices(rank, ranks, seed)
            Store(folder).save(
                step, Payload(rank, ranks, held, SHAPES, {"seed": seed}, {"mean": torch.ones(2) * seed}), gather
            )

        return run_ranks(ranks, work)

    return run


@pytest.fixture(scope="session")
def assert_holds(whole):
    """(reader, seed) asserts that every value reads back equal."""

    def check(reader, seed):
        assert reader.state == {"seed": seed}
        assert torch.equal(reader.buffers()["mean"], torch.ones(2) * seed)
        for slot, parameters in whole(seed).items():
            for name, tensor in parameters.items():
                assert torch.equal(reader.full(slot, name), tensor), f"{slot}/{name}"

    return check
