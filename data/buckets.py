"""Aspect-ratio buckets: images of similar shape are resized to the same shape, and trained together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .bucket_rule import LEFT_OUT, Bucket, BucketRule
from .errors import DataError
from .index import reindex
from .shards import Dataset
from .spread import Gather, spread


@dataclass(frozen=True)
class Buckets:
    """The buckets of a dataset's samples."""

    buckets: tuple[Bucket, ...]
    of: np.ndarray
    """Number of every sample's bucket, or `LEFT_OUT`, uint8 [n], by the sample's number in the dataset."""
    ends: np.ndarray
    """Number of samples in the first shards, int64 [S]."""
    unknown: int = 0
    """Samples whose image has no valid header, among those left out."""

    @property
    def counts(self) -> np.ndarray:
        """Samples of every bucket in every shard, int64 [buckets, S]."""
        found = np.zeros((len(self.buckets), len(self.ends)), dtype=np.int64)
        for shard, end in enumerate(self.ends):
            here = np.bincount(self.of[self._start(shard) : end], minlength=len(self.buckets))
            found[:, shard] = here[: len(self.buckets)]
        return found

    @property
    def left_out(self) -> int:
        return int(np.count_nonzero(self.of == LEFT_OUT))

    def number(self, shard: int, sample: int) -> int:
        """The bucket of a sample, by shard number and number within the shard."""
        return int(self.of[self._start(shard) + sample])

    def members(self, shard: int, bucket: int) -> np.ndarray:
        """Numbers within a shard of its samples in `bucket`, ascending."""
        return np.flatnonzero(self.of[self._start(shard) : self.ends[shard]] == bucket)

    def _start(self, shard: int) -> int:
        return int(self.ends[shard - 1]) if shard else 0


def open_buckets(dataset: Dataset, rule: BucketRule, rank: int = 0, gather: Gather = lambda value: [value]) -> Buckets:
    """The buckets of a dataset's samples, from the indexes of its shards, which the ranks divide. Raises DataError, on
    all ranks, for an index without sizes of images and when no sample is in a bucket."""

    def of_shard(shard: int) -> tuple[np.ndarray, int]:
        sizes = dataset.opened.read(shard, lambda opened: opened.index.image_sizes)
        if sizes is None:
            raise DataError(
                f"{dataset.shards[shard]}: its index has no sizes of images, which data.buckets needs; run"
                f" {reindex(_all_of(dataset.shards), dataset.index_dir)}"
            )
        known = np.array([size or (0, 0) for size in sizes], dtype=np.int64).reshape(-1, 2)
        return rule.assign(known), sum(size is None for size in sizes)

    found = spread(of_shard, range(len(dataset.shards)), rank, gather)
    of = np.concatenate([numbers for numbers, _ in found])
    opened = Buckets(rule.buckets, of, dataset.samples_per_shard.cumsum(), sum(unknown for _, unknown in found))
    if opened.left_out == len(of):
        raise DataError(
            f"{dataset.shards[0]}: no image is large enough for a bucket without being enlarged more than"
            f" {rule.max_upscale:g} times; give data.buckets.areas a smaller one, or raise data.buckets.max_upscale"
        )
    return opened


def _all_of(shards: Sequence[str]) -> str:
    """The folder of the shards, if they have one in common, else the first shard."""
    folders = {shard.rpartition("/")[0] for shard in shards}
    return shards[0] if len(folders) > 1 or "" in folders else folders.pop()
