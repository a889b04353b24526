from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bifrost.data import DataError, Plan, rank_positions

counts = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)
seeds = st.integers(0, 2**64 - 1)
blocks = st.integers(1, 8)


@given(counts, seeds, blocks, st.integers(0, 10**6))
@settings(deadline=None)
def test_every_sample_is_read_once_per_epoch(counts, seed, block, epoch):
    plan = Plan(counts, seed, block)
    located = plan.locate(epoch * plan.samples + np.arange(plan.samples))
    assert (located.epoch == epoch).all()
    assert sorted(located.index) == list(range(sum(counts)))
    expected = [(shard, sample) for shard, count in enumerate(counts) for sample in range(count)]
    assert [expected[index] for index in located.index] == list(zip(located.shard, located.sample, strict=True))


@given(counts, seeds, blocks, st.data())
@settings(deadline=None)
def test_single_and_batched_positions_agree(counts, seed, block, data):
    n = sum(counts)
    positions = np.array(data.draw(st.lists(st.integers(0, 5 * n), min_size=1, max_size=20)))
    together = Plan(counts, seed, block).locate(positions)
    for at, position in enumerate(positions):
        alone = Plan(counts, seed, block).locate(np.array([[position]]))
        assert alone.index.shape == (1, 1)
        assert [part.item() for part in alone] == [part[at] for part in together]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), seeds, blocks, st.integers(1, 200), st.integers(0, 3000))
@settings(deadline=None)
def test_window_of_positions_touches_few_shards(counts, seed, block, window, start):
    plan = Plan(counts, seed, block)
    window = min(window, plan.samples)
    located = plan.locate(start + np.arange(window))
    shards = len(set(zip(located.epoch.tolist(), located.shard.tolist(), strict=True)))
    # All groups but the first and last are entirely inside the window, and the last of each epoch may be short.
    whole_groups = window // (block * min(counts))
    assert shards <= block * (whole_groups + 3)
    groups_at_a_time = plan.locate(np.arange(plan.samples)).shard
    order = list(dict.fromkeys(groups_at_a_time.tolist()))
    for first in range(0, len(order), block):
        group = set(order[first : first + block])
        inside = np.flatnonzero(np.isin(groups_at_a_time, list(group)))
        assert inside[-1] - inside[0] + 1 == len(inside), "a group is finished before the next one starts"


def test_epochs_and_seeds_differ():
    def order(seed, epoch):
        plan = Plan([4] * 100, seed, shuffle_window=4)
        return plan.locate(epoch * 400 + np.arange(400)).index.tolist()

    orders = [order(0, 0), order(0, 1), order(0, 2), order(1, 0), order(1, 1)]
    assert len({tuple(o) for o in orders}) == 5
    for one in orders:
        assert np.abs(np.corrcoef(one, range(400))[0, 1]) < 0.3, "shards come in no order either"


def test_order_is_pinned():
    """A run has to resume in the same order after every upgrade; these numbers must never change."""
    plan = Plan([3, 0, 4, 2, 5], seed=7, shuffle_window=2)
    assert plan.locate(np.arange(16)).index.tolist() == [11, 10, 12, 13, 9, 6, 5, 4, 3, 8, 7, 2, 0, 1, 7, 8]


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(micro_batch):
    global_batch = 2048
    for step in (0, 3, 10**9):
        expected = np.arange(step * global_batch, (step + 1) * global_batch)
        for ranks in (1, 2, 4, 8, 512):
            shares = [rank_positions(step, rank, ranks, global_batch, micro_batch) for rank in range(ranks)]
            assert {share.shape for share in shares} == {(global_batch // ranks // micro_batch, micro_batch)}
            assert np.array_equal(np.sort(np.concatenate(shares, axis=None)), expected)
            # Micro-batch m of all ranks, in rank order, is the m-th part of the global batch.
            assert np.array_equal(np.stack(shares, axis=1).ravel(), expected)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_ranks_are_disjoint_and_complete(ranks, accumulation, micro_batch, step):
    global_batch = ranks * accumulation * micro_batch
    shares = [rank_positions(step, rank, ranks, global_batch, micro_batch).ravel() for rank in range(ranks)]
    assert sorted(np.concatenate(shares)) == list(range(step * global_batch, (step + 1) * global_batch))


def test_batch_may_span_two_epochs():
    plan = Plan([5, 5], seed=0)
    located = plan.locate(rank_positions(1, 0, 1, 8, 4))
    assert located.epoch.ravel().tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


def test_plan_of_hundreds_of_millions_of_samples_is_cheap():
    plan = Plan(np.full(50_000, 10_000), seed=0)
    assert plan.samples == 500_000_000
    positions = rank_positions(123_456, 17, 512, 8192, 16)
    located = plan.locate(positions)
    assert len(np.unique(located.shard)) <= 32
    held = sum(order.nbytes for order in plan._orders.values())
    assert held < 16 * 10_000 * 8 * 4 + 1, "only the groups in use are held"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan([0, 0], 0), "no samples"),
        (lambda: Plan([1], 0, shuffle_window=0), "shuffle_window is 0"),
        (lambda: Plan([1], -1), "seed is -1"),
        (lambda: rank_positions(0, 2, 2, 8, 1), "rank 2"),
        (lambda: rank_positions(0, 0, 3, 8, 1), "does not divide by ranks x micro_batch, 3 x 1"),
    ],
)
def test_invalid_arguments_are_named(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_plan_shards_and_ingest_do_not_import_torch():
    code = (
        "import sys, bifrost.data.plan, bifrost.data.shards, bifrost.data.write, bifrost.data.transforms,"
        " bifrost.data.ingest, bifrost.data.demo, bifrost.data.cli; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
