"""Slice arithmetic: which elements of a parameter a rank holds, and where a range was saved.

A parameter of `numel` elements is flattened, padded at its end and sharded evenly over the ranks, as in ZeRO-3. Files
hold the slices without padding, so the last ranks' slices may be short or empty.
"""

from __future__ import annotations

from typing import NamedTuple


class Read(NamedTuple):
    """One contiguous copy: elements [start, stop) of a saved rank's slice go to offset `at` of the result."""

    rank: int
    start: int
    stop: int
    at: int


def rank_file(rank: int) -> str:
    """Name of the file written by `rank`."""
    return f"rank-{rank:05d}.safetensors"


def slice_size(numel: int, ranks: int) -> int:
    """Number of elements in a rank's slice, including padding."""
    return -(-numel // ranks)


def local_range(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    """[start, stop) of `rank`'s slice, without padding; equal if the slice is empty."""
    size = slice_size(numel, ranks)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def reads(numel: int, lo: int, hi: int, saved_ranks: int) -> list[Read]:
    """Reads that make up elements [lo, hi) of a parameter saved by `saved_ranks` ranks, in order.

    Raises IndexError if the range is outside the parameter.
    """
    if not 0 <= lo <= hi <= numel:
        raise IndexError(f"elements [{lo}, {hi}) requested of a parameter with {numel}")
    if lo == hi:
        return []
    size = slice_size(numel, saved_ranks)
    pieces = []
    for rank in range(lo // size, (hi - 1) // size + 1):
        first, last = local_range(numel, rank, saved_ranks)
        start, stop = max(lo, first), min(hi, last)
        pieces.append(Read(rank, start - first, stop - first, start - lo))
    return pieces
