"""Slice arithmetic: which elements of a parameter a rank holds, and where a range of them was saved.

A parameter of `numel` elements is flattened, padded at its end and cut evenly over the ranks, which is how ZeRO-3 holds
it. Files hold the slices without the padding, so the last ranks' slices may be short or empty.
"""

from __future__ import annotations

from typing import NamedTuple


class Read(NamedTuple):
    """One contiguous piece to copy: elements [start, stop) of a saved rank's slice go to offset `at` of the result."""

    rank: int
    start: int
    stop: int
    at: int


def slice_size(numel: int, ranks: int) -> int:
    """Elements a rank's slice has, padding included."""
    return -(-numel // ranks)


def local_range(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    """First element of `rank`'s slice and the one after its last, padding excluded; equal when the slice is empty."""
    size = slice_size(numel, ranks)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def reads(numel: int, lo: int, hi: int, saved_ranks: int) -> list[Read]:
    """Pieces that make up elements [lo, hi) of a parameter saved by `saved_ranks` ranks, in order.

    Raises IndexError when the range lies outside the parameter.
    """
    if not 0 <= lo <= hi <= numel:
        raise IndexError(f"elements [{lo}, {hi}) asked of a parameter of {numel}")
    if lo == hi:
        return []
    size = slice_size(numel, saved_ranks)
    pieces = []
    for rank in range(lo // size, (hi - 1) // size + 1):
        first, last = local_range(numel, rank, saved_ranks)
        start, stop = max(lo, first), min(hi, last)
        pieces.append(Read(rank, start - first, stop - first, start - lo))
    return pieces
