"""Headers of the shards of several datasets that are read as one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

from .catalogue import Headers
from .errors import DataError
from .index import Header


class JoinedHeaders:
    """The headers of `parts`, in order."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self.starts = [0, *accumulate(map(len, parts))]
        """First shard of each part, and the number of all shards."""

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, shard: int) -> Header:
        part, number = self._place(shard)
        return part[number]

    def __iter__(self) -> Iterator[Header]:
        return chain.from_iterable(self._parts)

    def stale(self, shard: int, index: str) -> DataError | None:
        """The error for a shard whose index is not the one in its catalogue; None if it has no catalogue."""
        part, number = self._place(shard)
        return None if isinstance(part, list) else part.stale(number, index)

    def _place(self, shard: int) -> tuple[Part, int]:
        number = part_of(self.starts, shard)
        return self._parts[number], shard - self.starts[number]


Part = list[Header] | Headers | JoinedHeaders


def part_of(starts: Sequence[int], shard: int) -> int:
    """Number of the part that contains `shard`; starts: first shard of each part, and the number of all shards."""
    return bisect_right(starts, shard) - 1
