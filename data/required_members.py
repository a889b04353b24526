"""Whether the samples of a data set have the members that are asked for, in shards spread evenly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .errors import DataError
from .index import Members
from .shard_list import format_shards
from .source_images import source_type
from .units import counted

if TYPE_CHECKING:
    from .shards import Dataset

LOOKED_AT = 8
"""Shards whose indexes are searched for the members that captions are chosen from."""


def require_members(dataset: Dataset) -> None:
    """DataError for a member of the dataset's captions that none of its samples has, in shards spread evenly."""
    missing, kinds, seen, some = set(dataset.captions.weights), set(), 0, _spread_shards(dataset)
    for members in _members_in(dataset, some):
        kinds.update(members)
        missing -= members.keys()
        seen += 1
        if not missing:
            return
    names, there = (", ".join(f".{kind}" for kind in sorted(each)) for each in (missing, kinds))
    raise DataError(
        f"{format_shards(dataset.shards)}: no captions in KEY{names}: {seen:,} samples of {counted(len(some), 'shard')}"
        f" have {there}; name members that are there in `captions`, or make shards that have more with `bifrost data"
        " ingest`"
    )


def has_source_images(dataset: Dataset) -> bool:
    """Whether some sample has one, in shards spread evenly."""
    return any(source_type(members) for members in _members_in(dataset, _spread_shards(dataset)))


def require_source_images(dataset: Dataset) -> None:
    """DataError unless `has_source_images`."""
    if not has_source_images(dataset):
        looked_at = counted(len(_spread_shards(dataset)), "shard")
        raise DataError(
            f"{format_shards(dataset.shards)}: no source images in {looked_at}; task=editing needs KEY.source.jpg (or"
            " jpeg, png, webp) next to each image"
        )


def _spread_shards(dataset: Dataset) -> list[int]:
    """Up to about twice LOOKED_AT shards with samples, spread evenly."""
    filled = np.flatnonzero(dataset.samples_per_shard)
    return filled[:: max(1, len(filled) // LOOKED_AT)].tolist()


def _members_in(dataset: Dataset, shards: list[int]) -> Iterator[Members]:
    """The members of every sample in these shards."""
    for shard in shards:
        for sample in range(int(dataset.samples_per_shard[shard])):
            yield dataset.entry(shard, sample)[1]
