"""The sample at each position of training in aspect-ratio buckets, as a pure function of (seed, position).

Every global batch has samples of one bucket. Each bucket is a stream of its own with its own epochs, ordered like a
dataset without buckets (`Plan`), or like a mixture of sources (`MixedPlan`). Which bucket a global batch has follows
from the shares of the buckets' samples alone: global batches are interleaved like the samples of sources, so that the
shares are exact, and no sample is read twice or left out at the end of an epoch.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from .buckets import Buckets
from .errors import DataError
from .mixture import INDEX_BITS, MOST_OPEN, Interleaving, MixedPlan, PlannedSource, Segment, whole_weights
from .plan import Located, Plan


class Mixture(NamedTuple):
    """Several sources in buckets."""

    sources: Sequence[PlannedSource]
    """Those that are open, in the order of their shards."""
    segments: Sequence[Segment]
    """See `MixedPlan`."""
    held: Mapping[int, Sequence[int]]
    """Number of every source of the segments, also of those that are not open -> its samples in each bucket."""


class _Stream(NamedTuple):
    """The samples of one bucket."""

    order: Plan | MixedPlan
    shards: np.ndarray
    """Number in the dataset of each of the order's shards, int64."""


class BucketedPlan:
    """The order of the samples of a dataset in buckets; see `Plan`.

    mixture: of several sources; None: of one dataset. With a single bucket the order is that of `Plan`, or `MixedPlan`,
    and `Located.index` always is the one that these have for a sample.
    """

    def __init__(
        self,
        buckets: Buckets,
        samples_per_shard: np.ndarray,
        global_batch: int,
        seed: int,
        shuffle_window: int = 16,
        mixture: Mixture | None = None,
    ) -> None:
        self.samples_per_shard = samples_per_shard
        self.buckets = buckets
        self.global_batch = global_batch
        counts = buckets.counts
        parts = _parts(mixture, samples_per_shard)
        self._first_index = np.concatenate([_first_indexes(each, samples_per_shard[s]) for each, s in parts.items()])
        held = mixture.held if mixture else {0: counts.sum(axis=1).tolist()}
        self.segments = list(mixture.segments) if mixture else [Segment(0, {0: 1})]
        self._interleavings = [Interleaving(_shares(segment.weights, held)) for segment in self.segments]
        self._starts = [segment.batch for segment in self.segments]
        self._before: list[dict[int, int]] = [{}]
        """Global batches of each bucket before each segment."""
        for number, start in enumerate(self._starts[1:]):
            self._before.append(self._counts(number, start))
        self._streams: dict[int, _Stream] = {}
        numbers = np.arange(len(samples_per_shard))
        for bucket, here in enumerate(counts):
            if mixture is None and here.any():
                self._streams[bucket] = _Stream(Plan(here, seed, shuffle_window), numbers)
            elif mixture and (opened := {each: shards for each, shards in parts.items() if here[shards].any()}):
                planned = [PlannedSource(number, here[shards]) for number, shards in opened.items()]
                mixed = MixedPlan(planned, self._segments_of(bucket, held), global_batch, seed, shuffle_window)
                self._streams[bucket] = _Stream(mixed, np.concatenate([numbers[each] for each in opened.values()]))

    @property
    def open_shards(self) -> int:
        """Those of the bucket that needs most, twice: the streams read the same shards at about the same time, and one
        may be at the end of an epoch while another begins the next."""
        return min(MOST_OPEN, 2 * max(stream.order.open_shards for stream in self._streams.values()))

    @property
    def shares(self) -> list[float]:
        """Of the global batches, those in each bucket, from the last change of a mixture on."""
        last = self._interleavings[-1]
        return [last.weights.get(bucket, 0) / last.cycle for bucket in range(len(self.buckets.buckets))]

    def bucket(self, batch: int) -> int:
        """Number of the bucket of global batch `batch`, counted from 0."""
        return self._place(batch)[0]

    def taken(self, batch: int) -> dict[int, int]:
        """See `MixedPlan.taken`."""
        bucket, place = self._place(batch)
        order = self._streams[bucket].order
        return order.taken(place) if isinstance(order, MixedPlan) else {0: self.global_batch}

    def locate(self, positions: np.ndarray) -> Located:
        """The samples at global `positions` (int64, any shape, >= 0). DataError for one of a source that is not
        open."""
        positions = np.asarray(positions, dtype=np.int64)
        batches, rests = np.divmod(positions.ravel(), self.global_batch)
        epoch, shard, sample = (np.empty_like(rests) for _ in range(3))
        for batch in np.unique(batches):
            here = np.flatnonzero(batches == batch)
            bucket, place = self._place(int(batch))
            if bucket not in self._streams:
                raise DataError(f"the sources with samples of {self.buckets.buckets[bucket]} are not open")
            order, shards = self._streams[bucket]
            found = order.locate(place * self.global_batch + rests[here])
            epoch[here], shard[here] = found.epoch, shards[found.shard]
            for number in np.unique(shard[here]):
                chosen = shard[here] == number
                sample[here[chosen]] = self.buckets.members(int(number), bucket)[found.sample[chosen]]
        index = self._first_index[shard] + sample
        return Located(*(part.reshape(positions.shape) for part in (epoch, shard, sample, index)))

    def _place(self, batch: int) -> tuple[int, int]:
        """The bucket of a global batch, and the number of global batches of that bucket before it."""
        segment = bisect.bisect_right(self._starts, batch) - 1
        before, after = self._counts(segment, batch), self._counts(segment, batch + 1)
        bucket = next(each for each, count in after.items() if count > before.get(each, 0))
        return bucket, before.get(bucket, 0)

    def _counts(self, segment: int, batch: int) -> dict[int, int]:
        """Global batches of each bucket before `batch`, which is in `segment` or at its end."""
        found = dict(self._before[segment])
        for bucket, count in self._interleavings[segment].counts(batch - self._starts[segment]).items():
            found[bucket] = found.get(bucket, 0) + count
        return found

    def _segments_of(self, bucket: int, held: Held) -> list[Segment]:
        """The segments of one bucket, which counts its own global batches: in each, a source has its share of the
        samples of this bucket."""
        found = []
        for segment, before in zip(self.segments, self._before, strict=True):
            weights = _weights_in(bucket, segment.weights, held)
            if weights:
                found.append(Segment(before.get(bucket, 0), weights))
        return found


def _parts(mixture: Mixture | None, samples_per_shard: np.ndarray) -> dict[int, slice]:
    """Number of each open source -> its shards in the dataset."""
    if mixture is None:
        return {0: slice(0, len(samples_per_shard))}
    found, start = {}, 0
    for source in mixture.sources:
        found[source.number] = slice(start, start + len(source.samples_per_shard))
        start = found[source.number].stop
    return found


def _first_indexes(number: int, samples_per_shard: np.ndarray) -> np.ndarray:
    """`Located.index` of the first sample of each shard of a source."""
    return (number << INDEX_BITS) + np.concatenate([[0], np.cumsum(samples_per_shard[:-1])]).astype(np.int64)


Held = Mapping[int, Sequence[int]]
"""See `Mixture`."""


def _shares(weights: Mapping[int, int], held: Held) -> dict[int, int]:
    """Number of each bucket that has samples -> its share of the global batches, as whole numbers. weights: of the
    sources."""
    found: dict[int, Fraction] = {}
    for source, weight in weights.items():
        for bucket, samples in enumerate(held[source]):
            found[bucket] = found.get(bucket, Fraction()) + Fraction(weight * samples, sum(held[source]))
    return _whole(found)


def _weights_in(bucket: int, weights: Mapping[int, int], held: Held) -> dict[int, int]:
    """Number of each source that has samples in `bucket` -> its weight there."""
    return _whole({source: Fraction(w * held[source][bucket], sum(held[source])) for source, w in weights.items()})


def _whole(shares: Mapping[int, Fraction]) -> dict[int, int]:
    """The shares that are not 0, as whole numbers."""
    kept = {number: share for number, share in shares.items() if share}
    return dict(zip(kept, whole_weights(list(kept.values())), strict=True)) if kept else {}
