"""The sample at each position of training on several weighted sources, as a pure function of (seed, position).

Each source has a `Plan` of its own, through which it goes epoch by epoch. The mixture only decides how many samples of
which source a global batch takes: sample j of a source with the share s is due at position (j + 1/2) / s, and samples
are taken in the order in which they are due. A share is thus kept as closely as whole samples allow, in every global
batch and over the whole run, and the samples of each source taken before any position are a closed form. Within a
global batch the samples are shuffled, so that no rank reads one source more than another.

When sources or weights change, a new segment begins at a recorded global batch. The sequence before it stays as it was,
and each source continues where it was.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from .errors import DataError
from .plan import Located, Plan, permutation, remember

CACHED_BATCHES = 4
MOST_OPEN = 512
"""Shards that a process keeps open for all sources together; half of the usual limit of open files."""
INDEX_BITS = 40
"""Bits of `Located.index` below the number of the source: up to 10^12 samples per source."""


def whole_weights(weights: Sequence[Fraction]) -> list[int]:
    """The smallest whole numbers in the ratio of `weights`, of which one is above 0."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    found = [int(weight * scale) for weight in weights]
    divisor = math.gcd(*found)
    return [weight // divisor for weight in found]


class Interleaving:
    """How many samples of each source are among the first p.

    weights: whole numbers by the number of the source. After every `sum(weights)` positions each source has had exactly
    its weight; before any position p, a source with the share s of n sources has had p s samples, within (1 + n s) / 2.
    """

    def __init__(self, weights: Mapping[int, int]) -> None:
        self.weights = dict(sorted(weights.items()))
        self.cycle = sum(self.weights.values())

    def counts(self, position: int) -> dict[int, int]:
        """Samples of each source among the first `position`."""
        cycles, rest = divmod(position, self.cycle)
        # All samples due before the whole number `at` are among the first `rest`, and not all due before `at` + 1 are.
        # The number of samples due before any position differs from the position by at most half the sources.
        margin = len(self.weights) // 2 + 1
        first = max(0, rest - margin)
        at = first + bisect.bisect_right(range(first + 1, rest + margin + 1), rest, key=self._due)
        found = {source: self._due_of(weight, at) for source, weight in self.weights.items()}
        missing = rest - sum(found.values())
        if missing:  # of each source at most one sample is due in an interval of length 1
            due = sorted(found, key=lambda source: (Fraction(2 * found[source] + 1, self.weights[source]), source))
            for source in due[:missing]:
                found[source] += 1
        return {source: count + cycles * self.weights[source] for source, count in found.items()}

    def _due(self, position: int) -> int:
        return sum(self._due_of(weight, position) for weight in self.weights.values())

    def _due_of(self, weight: int, position: int) -> int:
        """Samples of a source that are due before `position`: those j with (2 j + 1) cycle < 2 weight position."""
        return (2 * weight * position + self.cycle - 1) // (2 * self.cycle)


@dataclass(frozen=True)
class Segment:
    """A part of the sequence with the same sources and weights."""

    batch: int
    """The first global batch, counted from 0."""
    weights: dict[int, int]
    """Number of each source -> its weight, a whole number."""


@dataclass(frozen=True)
class PlannedSource:
    number: int
    """Of the source in the run, in the order of their first use."""
    samples_per_shard: np.ndarray
    """int64 [S]."""


class _Opened(NamedTuple):
    plan: Plan
    first_shard: int
    """Number of its first shard among the shards of all sources."""


class _Batch(NamedTuple):
    """A global batch, int64 [B] each."""

    sources: np.ndarray
    places: np.ndarray
    """Position in the sequence of the source."""


class MixedPlan:
    """The order of all samples of several sources; see `Plan`.

    sources: those that are open, in the order of their shards; the others of the run are not needed for the global
    batches of segments without them. segments: by their first batch, the first one from batch 0. `Located.shard` counts
    the shards of all sources. `Located.index` contains the number of the source and is thus the same in every segment.
    """

    def __init__(
        self,
        sources: Sequence[PlannedSource],
        segments: Sequence[Segment],
        global_batch: int,
        seed: int,
        shuffle_window: int = 16,
    ) -> None:
        self.samples_per_shard = np.concatenate([source.samples_per_shard for source in sources])
        self.segments = list(segments)
        self.global_batch = global_batch
        self.seed = seed
        self._sources: dict[int, _Opened] = {}
        shards = self._open_shards = 0
        for source in sources:
            plan = Plan(source.samples_per_shard, source_seed(seed, source.number), shuffle_window, cached_groups=2)
            self._sources[source.number] = _Opened(plan, shards)
            shards += len(source.samples_per_shard)
            self._open_shards += min(plan.open_shards, len(source.samples_per_shard))
        self._starts = [segment.batch for segment in self.segments]
        self._interleavings = [Interleaving(segment.weights) for segment in self.segments]
        self._before: list[dict[int, int]] = [{}]
        """Samples of each source before each segment."""
        for number, start in enumerate(self._starts[1:]):
            self._before.append(self._counts(number, start))
        self._batches: OrderedDict[int, _Batch] = OrderedDict()

    @property
    def open_shards(self) -> int:
        """Those of two consecutive groups of every source, within the limit of a process."""
        return min(MOST_OPEN, self._open_shards)

    def counts(self, batch: int) -> dict[int, int]:
        """Samples of each source in the global batches before `batch`, counted from 0."""
        return self._counts(self._segment(batch), batch)

    def taken(self, batch: int) -> dict[int, int]:
        """Samples of each source in the global batch `batch`, without those that have none."""
        return {source: len(places) for source, places in self._places(batch).items()}

    def locate(self, positions: np.ndarray) -> Located:
        """The samples at global `positions` (int64, any shape, >= 0). DataError for one of a source that is not
        open."""
        positions = np.asarray(positions, dtype=np.int64)
        batches, rests = np.divmod(positions.ravel(), self.global_batch)
        sources, places = np.empty_like(rests), np.empty_like(rests)
        for batch in np.unique(batches):
            here, found = batches == batch, self._batch(int(batch))
            sources[here], places[here] = found.sources[rests[here]], found.places[rests[here]]
        epoch, shard, sample, index = (np.empty_like(rests) for _ in Located._fields)
        for source in np.unique(sources).tolist():
            if source not in self._sources:
                raise DataError(f"source {source} of the run is not open")
            plan, first_shard = self._sources[source]
            here = sources == source
            found = plan.locate(places[here])
            epoch[here], shard[here], sample[here] = found.epoch, first_shard + found.shard, found.sample
            index[here] = (source << INDEX_BITS) + found.index
        return Located(*(part.reshape(positions.shape) for part in (epoch, shard, sample, index)))

    def _segment(self, batch: int) -> int:
        return bisect.bisect_right(self._starts, batch) - 1

    def _counts(self, segment: int, batch: int) -> dict[int, int]:
        position = (batch - self._starts[segment]) * self.global_batch
        found = dict(self._before[segment])
        for source, count in self._interleavings[segment].counts(position).items():
            found[source] = found.get(source, 0) + count
        return found

    def _places(self, batch: int) -> dict[int, range]:
        """Positions in the sequence of each source that has samples in a global batch."""
        number = self._segment(batch)
        before, after = self._counts(number, batch), self._counts(number, batch + 1)
        found = {source: range(before.get(source, 0), end) for source, end in after.items()}
        return {source: places for source, places in found.items() if places}

    def _batch(self, batch: int) -> _Batch:
        if batch not in self._batches:
            found = self._places(batch)
            sources = np.repeat(np.array(list(found)), [len(places) for places in found.values()])
            places = np.concatenate([np.arange(each.start, each.stop) for each in found.values()])
            order = permutation(self.global_batch, derived_seed(self.seed, "mixture"), batch, stream=0)
            remember(self._batches, batch, _Batch(sources[order], places[order]), CACHED_BATCHES)
        return self._batches[batch]


def source_seed(seed: int, number: int) -> int:
    """Seed of a source's own plan; that of the first one is the run's, as in a run on this source alone."""
    return derived_seed(seed, str(number)) if number else seed


def derived_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest(), "little")
