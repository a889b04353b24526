"""The sample at each position of training, as a pure function of (seed, epoch, position).

Positions are unbounded: position p is in epoch p // n. In each epoch the shards are permuted and split into groups of
`shuffle_window`, and the samples of a group are shuffled together. Every sample is thus read once per epoch, from at
most `shuffle_window` shards at a time. Nothing depends on ranks or workers, so the state to resume from is one integer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from .errors import DataError

CACHED_GROUPS = 4  # a batch spans at most two groups, and twice as many at the border of an epoch


class Located(NamedTuple):
    """Planned samples: int64 arrays of the positions' shape."""

    epoch: np.ndarray
    shard: np.ndarray
    sample: np.ndarray
    """Number within the shard."""
    index: np.ndarray
    """Number within the dataset, 0 .. n - 1."""


class SampleOrder(Protocol):
    """The sample at each position of training: of one source (`Plan`), or of several (`MixedPlan`)."""

    samples_per_shard: np.ndarray
    """Sample counts, int64 [S]."""

    @property
    def open_shards(self) -> int:
        """Number of shards to keep open, with which no shard is opened twice in a row."""
        ...

    def locate(self, positions: np.ndarray) -> Located:
        """The samples at global `positions` (int64, any shape, >= 0)."""
        ...


class _Epoch(NamedTuple):
    shards: np.ndarray
    """Shards in this epoch's order, [S]."""
    starts: np.ndarray
    """First position of each shard within the epoch, before the shuffle, [S + 1]."""
    groups: np.ndarray
    """First position of each group within the epoch, [groups + 1]."""


class Plan:
    """The order of all samples of a dataset.

    samples_per_shard: sample counts, [S]. seed: any int in 0 .. 2**64 - 1. shuffle_window: shards shuffled together.
    cached_groups: groups whose order is kept. Costs O(S) per epoch and O(samples in the group) per group; no
    permutation of a full epoch is kept.
    """

    def __init__(
        self,
        samples_per_shard: Sequence[int] | np.ndarray,
        seed: int,
        shuffle_window: int = 16,
        cached_groups: int = CACHED_GROUPS,
    ) -> None:
        self.samples_per_shard = np.asarray(samples_per_shard, dtype=np.int64)
        self.seed = seed
        self.shuffle_window = shuffle_window
        self.cached_groups = cached_groups
        if shuffle_window < 1:
            raise DataError(
                f"shuffle_window is {shuffle_window}; it counts the shards shuffled together, so set it to 1 or more"
            )
        if not 0 <= seed < 1 << 64:
            raise DataError(f"seed is {seed}; set it between 0 and 2**64 - 1")
        self.samples = int(self.samples_per_shard.sum())
        if self.samples == 0:
            raise DataError("the dataset has no samples; name shards that have some")
        self._offsets = np.concatenate([[0], np.cumsum(self.samples_per_shard)])
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._orders: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        """Samples per epoch."""
        return self.samples

    @property
    def open_shards(self) -> int:
        """The shards of two consecutive groups."""
        return 2 * self.shuffle_window

    def locate(self, positions: np.ndarray) -> Located:
        """The samples at global `positions` (int64, any shape, >= 0)."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, rests = np.divmod(positions.ravel(), self.samples)
        shards, samples = np.empty_like(rests), np.empty_like(rests)
        for epoch in np.unique(epochs):
            layout = self._epoch(int(epoch))
            here = np.flatnonzero(epochs == epoch)
            groups = np.searchsorted(layout.groups, rests[here], side="right") - 1
            for group in np.unique(groups):
                chosen = here[groups == group]
                start = layout.groups[group]
                shuffled = start + self._order(int(epoch), int(group))[rests[chosen] - start]
                slot = np.searchsorted(layout.starts, shuffled, side="right") - 1
                shards[chosen] = layout.shards[slot]
                samples[chosen] = shuffled - layout.starts[slot]
        index = self._offsets[shards] + samples
        return Located(*(part.reshape(positions.shape) for part in (epochs, shards, samples, index)))

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            shards = permutation(len(self.samples_per_shard), self.seed, epoch, stream=0)
            starts = np.concatenate([[0], np.cumsum(self.samples_per_shard[shards])])
            groups = np.append(starts[:-1][:: self.shuffle_window], starts[-1])
            remember(self._epochs, epoch, _Epoch(shards, starts, groups), 2)
        return self._epochs[epoch]

    def _order(self, epoch: int, group: int) -> np.ndarray:
        """The shuffled order of one group's samples."""
        key = (epoch, group)
        if key not in self._orders:
            bounds = self._epoch(epoch).groups
            size = int(bounds[group + 1] - bounds[group])
            order = permutation(size, self.seed, epoch, stream=group + 1)
            remember(self._orders, key, order, self.cached_groups)
        self._orders.move_to_end(key)
        return self._orders[key]


def permutation(n: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """The permutation of 0 .. n - 1 for (seed, epoch, stream).

    Sorts raw Philox words: numpy guarantees that these never change, unlike `Generator.permutation`.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)  # the high word, so that streams never overlap
    return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(n), kind="stable")


def remember(cache: OrderedDict, key: object, value: object, limit: int) -> None:
    cache[key] = value
    if len(cache) > limit:
        cache.popitem(last=False)


class Share(NamedTuple):
    """The part of every global batch that a rank reads."""

    rank: int
    ranks: int
    global_batch: int
    """Samples per step."""
    micro_batch: int
    """Samples per rank and backward pass."""


def rank_positions(step: int, rank: int, ranks: int, global_batch: int, micro_batch: int) -> np.ndarray:
    """Global positions that `rank` of `ranks` trains on in `step`, int64 [accumulation, micro_batch].

    Step k covers k * global_batch + [0, global_batch) for any number of ranks; row m is the rank's m-th micro-batch.
    """
    if not 0 <= rank < ranks:
        raise DataError(f"rank {rank} is outside 0 .. {ranks - 1}; ranks are counted from 0")
    if global_batch % (ranks * micro_batch):
        raise DataError(
            f"global_batch {global_batch} does not divide by ranks x micro_batch, {ranks} x {micro_batch}:"
            " change global_batch or micro_batch"
        )
    rows = np.arange(global_batch // (ranks * micro_batch), dtype=np.int64) * ranks + rank
    return step * global_batch + rows[:, None] * micro_batch + np.arange(micro_batch, dtype=np.int64)
