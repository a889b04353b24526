"""Ranks as threads of one process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any


def in_ranks(work: Callable[[int, Callable[[Any], list]], Any], ranks: int) -> list:
    """Results of `work(rank, gather)` on `ranks` threads, with an all-gather of objects."""
    values: list = [None] * ranks
    barrier = Barrier(ranks, timeout=30)

    def run(rank: int) -> Any:
        def gather(value: Any) -> list:
            values[rank] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        return work(rank, gather)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))
