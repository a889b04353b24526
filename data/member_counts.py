"""Members of samples next to their images, such as captions: how many samples have each, and how long they are."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from .index import image_type, load_index
from .progress import track

READERS = 8
"""Indexes that are read at a time: on remote storage they are small requests."""


@dataclass
class MemberCount:
    """Members with one extension."""

    samples: int = 0
    shortest: int = 0
    """Bytes, as all lengths."""
    longest: int = 0
    total: int = 0

    @property
    def mean(self) -> float:
        return self.total / self.samples

    def add(self, other: MemberCount) -> None:
        self.shortest = min(self.shortest, other.shortest) if self.samples else other.shortest
        self.longest = max(self.longest, other.longest)
        self.samples, self.total = self.samples + other.samples, self.total + other.total


def count_members(shards: Sequence[str], index_dir: str | None) -> dict[str, MemberCount]:
    """Extension -> count of the members with it, the most frequent first; from the shards' indexes, which it reads
    whole. index_dir: folder of these. Raises DataError like `load_index`."""
    found: dict[str, MemberCount] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for counts in track(
            pool.map(partial(_of_shard, index_dir), shards), "counting captions", len(shards), "shards"
        ):
            for kind, count in counts.items():
                found.setdefault(kind, MemberCount()).add(count)
    return dict(sorted(found.items(), key=lambda each: (-each[1].samples, each[0])))


def _of_shard(index_dir: str | None, shard: str) -> dict[str, MemberCount]:
    index, found = load_index(shard, index_dir=index_dir), dict[str, MemberCount]()
    for sample in range(len(index.lines)):
        _, members = index.entry(sample)
        image = image_type(members)
        for kind, (_, size) in members.items():
            if kind != image:
                found.setdefault(kind, MemberCount()).add(MemberCount(1, size, size, size))
    return found
