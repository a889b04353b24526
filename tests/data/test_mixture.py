"""The interleaving of weighted sources: exact shares, random access, segments."""

from __future__ import annotations

import pickle
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bifrost.data import DataError, Plan, rank_positions
from bifrost.data.mixture import INDEX_BITS, Interleaving, MixedPlan, PlannedSource, Segment, whole_weights

weights = st.lists(st.integers(1, 50), min_size=1, max_size=8)
sources = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), min_size=1, max_size=5)


def plan(shards, segments, global_batch=8, seed=3, window=2) -> MixedPlan:
    opened = [PlannedSource(number, np.array(counts)) for number, counts in enumerate(shards)]
    return MixedPlan(opened, [Segment(batch, each) for batch, each in segments], global_batch, seed, window)


def brute(weights: dict[int, int], positions: int) -> list[int]:
    """The source of each position, by sorting all due times as fractions."""
    cycle = sum(weights.values())
    due = [
        (Fraction(2 * j + 1, 2) * cycle / weight, source)
        for source, weight in weights.items()
        for j in range(positions + 1)
    ]
    return [source for _, source in sorted(due)[:positions]]


@given(weights, st.integers(0, 200))
@settings(deadline=None)
def test_counts_are_those_of_sorting_all_due_times(given_weights, position):
    named = dict(enumerate(given_weights))
    order = brute(named, position)
    assert Interleaving(named).counts(position) == {source: order.count(source) for source in named}


@given(weights, st.integers(0, 10**15), st.integers(1, 10**6))
@settings(deadline=None)
def test_shares_are_exact_in_every_cycle_and_close_in_every_window(given_weights, start, width):
    named = dict(enumerate(given_weights))
    cycle, found = sum(given_weights), Interleaving(named)
    at = found.counts(start)
    assert sum(at.values()) == start
    after = found.counts(start + cycle)
    assert [after[source] - at[source] for source in named] == given_weights, "any cycle, wherever it starts"
    window = found.counts(start + width)
    for source, weight in named.items():
        share = Fraction(weight, cycle)
        bound = (1 + len(named) * share) / 2
        assert abs(at[source] - start * share) <= bound
        assert abs(window[source] - at[source] - width * share) <= 2 * bound


@given(sources, st.data())
@settings(deadline=None)
def test_each_source_is_read_in_the_order_of_its_own_plan(shards, data):
    """Over the positions in order, shuffled only within a global batch: every source goes through its epochs."""
    given_weights = data.draw(st.lists(st.integers(1, 9), min_size=len(shards), max_size=len(shards)))
    mixed = plan(shards, [(0, dict(enumerate(given_weights)))], window=2)
    located = mixed.locate(np.arange(12 * 8))
    first_shard = np.cumsum([0, *map(len, shards)])
    for number, counts in enumerate(shards):
        here = np.flatnonzero((located.shard >= first_shard[number]) & (located.shard < first_shard[number + 1]))
        alone = Plan(counts, mixed._sources[number].plan.seed, 2).locate(np.arange(len(here)))
        expected = zip(alone.epoch, alone.shard + first_shard[number], alone.sample, strict=True)
        found = zip(located.epoch[here], located.shard[here], located.sample[here], strict=True)
        for batch in range(12):
            taken = int(np.count_nonzero(here // 8 == batch))
            assert sorted(next(expected) for _ in range(taken)) == sorted(next(found) for _ in range(taken))
        assert (located.index[here] >> INDEX_BITS == number).all()


@given(sources, st.data())
@settings(deadline=None)
def test_seek_equals_iteration(shards, data):
    given_weights = data.draw(st.lists(st.integers(1, 9), min_size=len(shards), max_size=len(shards)))
    segments = [(0, dict(enumerate(given_weights))), (3, {0: 1})]
    together = plan(shards, segments).locate(np.arange(64))
    positions = np.array(data.draw(st.lists(st.integers(0, 63), min_size=1, max_size=12)))
    sought = plan(shards, segments).locate(positions)
    for part, whole in zip(sought, together, strict=True):
        assert part.tolist() == whole[positions].tolist()


@given(sources, st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**9))
@settings(deadline=None)
def test_ranks_divide_the_global_batches(shards, ranks, micro_batch, step):
    """Any number of ranks reads, together, the global batch of a single one."""
    given_weights = dict.fromkeys(range(len(shards)), 1)
    global_batch = 6 * ranks * micro_batch
    alone = plan(shards, [(0, given_weights)], global_batch)
    whole = alone.locate(np.arange(step * global_batch, (step + 1) * global_batch))
    parts = [
        plan(shards, [(0, given_weights)], global_batch).locate(
            rank_positions(step, rank, ranks, global_batch, micro_batch)
        )
        for rank in range(ranks)
    ]
    for name in whole._fields:
        rows = np.stack([getattr(part, name) for part in parts], axis=1).ravel()
        assert rows.tolist() == getattr(whole, name).tolist()
    taken = alone.taken(step)
    numbers, counts = np.unique(whole.index >> INDEX_BITS, return_counts=True)
    assert dict(zip(numbers.tolist(), counts.tolist(), strict=True)) == taken


def test_a_change_leaves_what_came_before_and_continues_each_source():
    shards = [[5, 6], [4, 3]]
    before = plan(shards, [(0, {0: 1, 1: 1})])
    after = plan([*shards, [9]], [(0, {0: 1, 1: 1}), (4, {0: 2, 2: 2})])
    for part, same in zip(after.locate(np.arange(32)), before.locate(np.arange(32)), strict=True):
        assert part.tolist() == same.tolist()
    assert after.counts(4) == {0: 16, 1: 16, 2: 0}
    later = after.locate(np.arange(32, 64))
    assert set((later.index >> INDEX_BITS).tolist()) == {0, 2}
    own = [
        Plan([5, 6], 3, 2).locate(np.arange(16, 32)),
        Plan([9], after._sources[2].plan.seed, 2).locate(np.arange(16)),
    ]
    for number, alone in zip((0, 2), own, strict=True):
        here = later.index >> INDEX_BITS == number
        found = zip(later.epoch[here].tolist(), later.sample[here].tolist(), strict=True)
        assert sorted(found) == sorted(zip(alone.epoch.tolist(), alone.sample.tolist(), strict=True))
    again = plan(shards, [(0, {0: 1, 1: 1}), (4, {0: 1}), (6, {0: 1, 1: 1})])
    assert again.counts(6) == {0: 32, 1: 16} and again.counts(7) == {0: 36, 1: 20}, "source 1 continues where it was"


def test_one_source_is_read_like_data_without_sources():
    """Up to the order within a global batch, so that such a run can be given more sources."""
    counts = [3, 4, 2, 5]
    alone = Plan(counts, 7, 2).locate(np.arange(40))
    mixed = plan([counts], [(0, {0: 1})], seed=7).locate(np.arange(40))
    for part, same in zip(mixed, alone, strict=True):
        assert np.sort(part.reshape(5, 8)).tolist() == np.sort(same.reshape(5, 8)).tolist()


def test_order_is_pinned():
    """A run has to resume in the same order after every upgrade; these numbers must never change."""
    located = plan([[3, 2], [4]], [(0, {0: 2, 1: 1})], global_batch=6, seed=7).locate(np.arange(18))
    assert (located.index >> INDEX_BITS).tolist() == [0, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1]
    assert (located.index & ((1 << INDEX_BITS) - 1)).tolist() == [0, 1, 2, 2, 4, 0, 2, 3, 3, 3, 0, 1, 3, 1, 1, 0, 4, 2]


def test_weights_are_reduced_exactly():
    assert whole_weights([Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]) == [7, 2, 1]
    assert whole_weights([Fraction("1e-3"), Fraction(3)]) == [1, 3000]
    assert whole_weights([Fraction(600), Fraction(1000)]) == [3, 5]


def test_a_hundred_sources_and_ten_million_samples_are_cheap():
    shards = [np.full(100, 1000)] * 100
    named = {number: 10**6 + number for number in range(100)}
    tracemalloc.start()
    mixed = plan(shards, [(0, named)], global_batch=4096, seed=0, window=16)
    for batch in (0, 10**9):
        for micro_batch in rank_positions(batch, 3, 64, 4096, 16):
            mixed.locate(micro_batch)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pickle.dumps(mixed)) < 60 << 20 and held < 60 << 20 and peak < 80 << 20
    assert mixed.open_shards == 512


def test_a_source_that_is_not_open_is_named():
    closed = MixedPlan([PlannedSource(1, np.array([4]))], [Segment(0, {0: 1, 1: 1})], 4, 0)
    with pytest.raises(DataError, match="source 0 of the run is not open"):
        closed.locate(np.arange(4))
