"""The data plan of imaginary data sets over many ranks: a small one sample by sample, and one of a billion samples."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...data import Plan, rank_positions
from ...recipes import BatchSplit
from ...recipes.schema import Data
from ..errors import Unhealthy

SHARDS, SAMPLES = 384, 1_000
"""The small data set: number of shards, and approximate samples per shard."""
LARGE_SHARDS, LARGE_SAMPLES = 100_000, 10_000
"""The same of the large one."""
GROUPS = 4
"""Groups of shards that are shuffled together, of the large data set: checked sample by sample."""
STEPS = 32
"""Steps of the large data set, spread over its epoch, that are checked."""


class Broken(Unhealthy):
    """Some data is not covered, or covered twice."""


def data(settings: Data, seed: int, splits: Sequence[BatchSplit]) -> dict[str, Any]:
    """Check an epoch over ranks x workers: every sample once, and equal global batches on other numbers of ranks.
    splits: of the run, then of resumes."""
    order = Plan(_counts(SHARDS, SAMPLES), seed, settings.shuffle_window)
    (split, *others), workers = splits, max(settings.workers, 1)
    ranks, steps = split.ranks, -(-len(order) // split.global_batch)
    middle = steps // 2
    whole = _positions(split, range(steps), workers)
    located = order.locate(whole)
    first = located.epoch == 0
    seen = np.bincount(located.index[first], minlength=len(order))
    if len(seen) != len(order) or (seen != 1).any():
        missing, twice = int((seen == 0).sum()), int((seen > 1).sum())
        raise Broken(f"an epoch over {ranks} ranks misses {missing} samples and repeats {twice}")
    wanted = np.sort(whole[middle:], axis=1)
    for other in others:
        if not np.array_equal(np.sort(_positions(other, range(middle, steps), workers), axis=1), wanted):
            raise Broken(f"after step {middle}, {other.ranks} ranks get other global batches than {ranks}")
    shards = [len(np.unique(located.shard[step])) for step in range(steps)]
    return {
        "samples": len(order),
        "shards": SHARDS,
        "steps": steps,
        "readers": ranks * workers,
        "resumed_at": middle,
        "resumed_on": [other.ranks for other in others],
        "shards_per_step_most": max(shards),
    }


def large_data(settings: Data, seed: int, splits: Sequence[BatchSplit]) -> dict[str, Any]:
    """Check a data set of a billion samples: its first groups sample by sample, and steps all over its epoch, which
    every number of ranks must divide into the same samples, none twice.

    An epoch is a permutation of shards, then one of samples per group, so that groups stand for all.
    """
    counts = _counts(LARGE_SHARDS, LARGE_SAMPLES)
    tracemalloc.start()
    begun = time.perf_counter()
    order = Plan(counts, seed, settings.shuffle_window)
    order.locate(np.zeros(1, dtype=np.int64))
    opened = time.perf_counter() - begun
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    _check_groups(order, counts, settings.shuffle_window)
    steps = -(-len(order) // splits[0].global_batch)
    seeks = []
    for step in np.random.default_rng(1).integers(0, steps, STEPS).tolist():
        wanted = step * splits[0].global_batch + np.arange(splits[0].global_batch)
        for split in splits:
            if not np.array_equal(np.sort(_positions(split, range(step, step + 1), 1)[0]), wanted):
                raise Broken(f"step {step} of {split.ranks} ranks is not global batch {step}")
        begun = time.perf_counter()
        located = order.locate(wanted)
        seeks.append(time.perf_counter() - begun)
        if len(np.unique(located.index + located.epoch * len(order))) != len(wanted):
            raise Broken(f"step {step} has a sample twice")
    return {
        "samples": len(order),
        "shards": LARGE_SHARDS,
        "steps": steps,
        "checked_steps": STEPS,
        "opened_s": opened,
        "seek_s": float(np.median(seeks)),
        "seek_s_most": max(seeks),
        "plan_bytes": held,
    }


def _check_groups(order: Plan, counts: np.ndarray, window: int) -> None:
    """The first groups: each sample of `window` shards once, and no shard in two groups."""
    start, before = 0, np.zeros(0, dtype=np.int64)
    for number in range(GROUPS):
        # The shards of a group are known after a few thousand of its samples.
        shards = np.unique(order.locate(start + np.arange(100 * window)).shard)
        if len(shards) != min(window, len(counts)):
            raise Broken(f"group {number} has {len(shards)} shards instead of {window}")
        size = int(counts[shards].sum())
        located = order.locate(start + np.arange(size))
        seen = np.zeros(int(counts.max()) * len(shards), dtype=np.int64)
        np.add.at(seen, np.searchsorted(shards, located.shard) * int(counts.max()) + located.sample, 1)
        expected = (np.arange(counts.max()) < counts[shards][:, None]).ravel()
        if not np.array_equal(seen, expected) or np.isin(shards, before).any():
            raise Broken(f"group {number} misses samples or repeats some")
        start, before = start + size, np.union1d(before, shards)


def _counts(shards: int, samples: int) -> np.ndarray:
    """Samples of every shard, up to a tenth more or fewer than `samples`."""
    return samples + np.random.default_rng(0).integers(-samples // 10, samples // 10 + 1, shards)


def _positions(split: BatchSplit, steps: range, workers: int) -> np.ndarray:
    """Positions [steps, global_batch] in the order of ranks and of loader workers, which alternate."""
    passes, ranks = split.passes, split.ranks
    numbers = np.arange(steps.start * passes, steps.stop * passes)
    rows: list[list[np.ndarray]] = [[] for _ in steps]
    for rank in range(ranks):
        for worker in range(workers):
            for number in numbers[worker::workers].tolist():
                step, row = divmod(number, passes)
                rows[step - steps.start].append(
                    rank_positions(step, rank, ranks, split.global_batch, split.micro_batch)[row]
                )
    return np.array([np.concatenate(row) for row in rows])
