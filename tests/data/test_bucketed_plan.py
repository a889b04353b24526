"""The order of samples in buckets: one bucket per global batch, exact shares, every sample once per epoch of its
bucket, the same for any ranks, workers and restarts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bifrost.data import (
    DataError,
    Loader,
    LoaderSettings,
    MixedPlan,
    Plan,
    PlannedSource,
    Segment,
    Share,
    open_dataset,
    rank_positions,
    write_shard,
)
from bifrost.data.bucket_rule import LEFT_OUT, Bucket, BucketRule
from bifrost.data.bucketed_plan import BucketedPlan, Mixture
from bifrost.data.buckets import Buckets, open_buckets

numbers = st.sampled_from([0, 1, 2, LEFT_OUT])
shards = st.lists(st.lists(numbers, max_size=9), min_size=1, max_size=6).filter(
    lambda found: any(each != LEFT_OUT for shard in found for each in shard)
)
THREE = tuple(Bucket((shape,)) for shape in [(8, 8), (6, 10), (10, 6)])


def made(of: list[list[int]]) -> tuple[Buckets, np.ndarray]:
    counts = np.array([len(shard) for shard in of])
    return Buckets(THREE, np.array([each for shard in of for each in shard], np.uint8), counts.cumsum()), counts


@given(shards, st.integers(0, 2**64 - 1), st.integers(1, 3), st.integers(1, 7))
@settings(deadline=None)
def test_shares_are_exact_and_every_sample_is_read_once_per_epoch_of_its_bucket(of, seed, window, global_batch):
    buckets, counts = made(of)
    plan = BucketedPlan(buckets, counts, global_batch, seed, window)
    samples = Counter(number for number in buckets.of.tolist() if number != LEFT_OUT)
    batches = samples.total()
    order = [plan.bucket(batch) for batch in range(batches)]
    assert Counter(order) == samples, "a share of the global batches is that of the samples"
    located = plan.locate(np.arange(batches * global_batch))
    assert (buckets.of[located.index] == np.repeat(order, global_batch)).all()
    starts = np.concatenate([[0], counts.cumsum()])
    assert (starts[located.shard] + located.sample == located.index).all()
    read = Counter(zip(located.epoch.tolist(), located.index.tolist(), strict=True))
    used = np.flatnonzero(buckets.of != LEFT_OUT)
    assert read == Counter((epoch, index) for epoch in range(global_batch) for index in used.tolist())


@given(shards, st.integers(0, 500), st.sampled_from([1, 2, 4]))
@settings(deadline=None)
def test_ranks_share_each_global_batch_at_any_position(of, step, ranks):
    buckets, counts = made(of)
    whole = BucketedPlan(buckets, counts, 8, 3, 2).locate(np.arange(8 * step, 8 * step + 8))
    parts = [
        BucketedPlan(buckets, counts, 8, 3, 2).locate(rank_positions(step, rank, ranks, 8, 2)) for rank in range(ranks)
    ]
    together = np.concatenate([part.index for part in parts], axis=1)
    assert together.ravel().tolist() == whole.index.tolist()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.integers(0, 99))
@settings(deadline=None)
def test_one_bucket_has_the_order_of_a_plan(counts, start):
    buckets, found = made([[0] * count for count in counts])
    positions = np.arange(8 * start, 8 * start + 40)
    for ours, plain in zip(
        BucketedPlan(buckets, found, 8, 5, 2).locate(positions), Plan(counts, 5, 2).locate(positions), strict=True
    ):
        assert np.array_equal(ours, plain)


SOURCES = [[[0, 0, 1, 2], [1, 1, LEFT_OUT, 0, 0]], [[2, 2, 1], [1] * 5]]


def mixture(of, segments) -> tuple[BucketedPlan, Buckets]:
    buckets, counts = made([shard for source in of for shard in source])
    sources = [PlannedSource(n, np.array([len(shard) for shard in source])) for n, source in enumerate(of)]
    held = {n: [sum(shard.count(b) for shard in source) for b in range(3)] for n, source in enumerate(of)}
    return BucketedPlan(buckets, counts, 4, 3, 2, Mixture(sources, segments, held)), buckets


def test_a_mixture_keeps_the_shares_of_sources_and_of_buckets():
    plan, buckets = mixture(SOURCES, [Segment(0, {0: 3, 1: 1})])
    # Samples of sources in buckets: 4, 3, 1 of 8 and 0, 6, 2 of 8; with weights 3 : 1 these are 12, 15, 5 of 32.
    order = [plan.bucket(batch) for batch in range(32)]
    assert Counter(order) == {0: 12, 1: 15, 2: 5}
    located = plan.locate(np.arange(32 * 4))
    sources = located.index >> 40
    assert Counter(sources.tolist()) == {0: 96, 1: 32}
    assert (sources == (located.shard >= 2)).all()
    whole = np.where(sources == 1, 9, 0) + (located.index & ((1 << 40) - 1))
    assert (buckets.of[whole] == np.repeat(order, 4)).all()
    for batch in range(32):
        assert plan.taken(batch) == Counter(sources[4 * batch : 4 * batch + 4].tolist())
    # 96 samples of the first source are 12 epochs of its 8; of the second 4.
    read = Counter(zip(whole.tolist(), located.epoch.tolist(), strict=True))
    assert set(read.values()) == {1}
    assert max(located.epoch[sources == 0]) == 11
    assert max(located.epoch[sources == 1]) == 3


def test_a_mixture_of_one_bucket_is_that_without_buckets():
    of = [[[0] * 4, [0] * 5], [[0] * 7]]
    segments = [Segment(0, {0: 2, 1: 1}), Segment(5, {1: 1}), Segment(9, {0: 1, 1: 1})]
    plan, _ = mixture(of, segments)
    plain = MixedPlan([PlannedSource(0, np.array([4, 5])), PlannedSource(1, np.array([7]))], segments, 4, 3, 2)
    for ours, theirs in zip(plan.locate(np.arange(80)), plain.locate(np.arange(80)), strict=True):
        assert np.array_equal(ours, theirs)


def test_a_change_of_the_mixture_continues_every_stream():
    before, _ = mixture(SOURCES, [Segment(0, {0: 3, 1: 1})])
    changed, _ = mixture(SOURCES, [Segment(0, {0: 3, 1: 1}), Segment(11, {1: 1}), Segment(20, {0: 1, 1: 1})])
    assert np.array_equal(before.locate(np.arange(44)), changed.locate(np.arange(44)))
    located = changed.locate(np.arange(400))
    assert (located.index[44:80] >> 40 == 1).all()
    read = list(zip(located.index.tolist(), located.epoch.tolist(), strict=True))
    assert len(set(read)) == len(read), "no sample twice in an epoch"
    for index, epoch in read:
        assert epoch == 0 or (index, epoch - 1) in read, "no sample left out"


def test_samples_of_a_source_that_is_not_open():
    buckets, counts = made(SOURCES[1])
    held = {0: [4, 3, 1], 1: [0, 6, 2]}
    segments = [Segment(0, {0: 1}), Segment(8, {1: 1})]
    plan = BucketedPlan(buckets, counts, 4, 3, 2, Mixture([PlannedSource(1, counts)], segments, held))
    whole, _ = mixture(SOURCES, segments)
    assert plan.locate(np.arange(32, 80)).index.tolist() == whole.locate(np.arange(32, 80)).index.tolist()
    with pytest.raises(DataError, match="not open"):
        plan.locate(np.arange(32))


def collate(items):
    assert len({item.image.shape for item in items}) == 1
    return {"read": [(item.key, item.epoch, item.index, item.bucket, item.image.shape) for item in items]}


@pytest.fixture
def dataset(make_image, tmp_path):
    """Images of three shapes in four shards, one of them unreadable."""
    for shard, count in enumerate([7, 0, 9, 6]):
        samples = []
        for number in range(count):
            image = make_image(number, size=[(20, 12), (12, 20), (16, 16), (22, 12)][(number + shard) % 4])
            image = image[:60] if (shard, number) == (2, 3) else image
            samples.append((f"k{shard}{number}", {"png": image, "txt": b"a"}))
        write_shard(tmp_path / f"s-{shard}.tar", samples)
    return open_dataset(str(tmp_path))


def read(dataset, ranks, workers, steps):
    """What each global batch has, over all ranks."""
    buckets = open_buckets(dataset, BucketRule((THREE,), 1.0))
    found = []
    for rank in range(ranks):
        plan = BucketedPlan(buckets, dataset.samples_per_shard, 8, 1, 2)
        share = Share(rank, ranks, 8, 2)
        settings = LoaderSettings((32,), workers, buckets=buckets)
        found.append([batch.arrays["read"] for batch in Loader(dataset, plan, collate, share, range(*steps), settings)])
    passes = 8 // (2 * ranks)
    return [
        [item for row in range(passes) for rank in range(ranks) for item in found[rank][step * passes + row]]
        for step in range(steps[1] - steps[0])
    ]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (2, 2), (4, 1)])
def test_loaders_read_the_same_sequence_on_any_ranks_and_workers_and_after_a_restart(dataset, ranks, workers):
    whole = read(dataset, 1, 0, (0, 9))
    assert len({item[4] for batch in whole for item in batch}) == 3
    for batch in whole:
        assert len({item[3] for item in batch}) == 1
    assert read(dataset, ranks, workers, (0, 5)) == whole[:5]
    assert read(dataset, ranks, workers, (5, 9)) == whole[5:]
