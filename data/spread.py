"""Work on shards that the ranks of a run divide; an error of one rank is raised on all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .errors import DataError
from .retry import failure as storage_failure
from .transience import verdict

THREADS = 32  # opening shards is bound by the latency of the file system
Gather = Callable[[Any], list[Any]]
"""All-gather of one value per rank, in rank order."""
Broadcast = Callable[[Any], Any]
"""Broadcast of rank 0's value; the values of the others are not used."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(
    work: Callable[[Item], Result], items: Sequence[Item], rank: int, gather: Gather, threads: int = THREADS
) -> list[Result]:
    """Results of `work` on every item, split among the ranks. The error of the first item that has one is raised on
    all, as if one rank had done all of the work."""
    ranks = len(gather(None))
    mine: list[Result] = []

    def do() -> None:
        with ThreadPoolExecutor(threads) as pool:
            for result in pool.map(work, items[rank::ranks]):
                mine.append(result)

    _, failure = _outcome(do)
    outcomes = gather((mine, failure))
    failed = [(len(done) * ranks + number, each) for number, (done, each) in enumerate(outcomes) if each is not None]
    if failed:
        raise min(failed, key=lambda one: one[0])[1]
    return [outcomes[number % ranks][0][number // ranks] for number in range(len(items))]


def from_first(work: Callable[[], Result], rank: int, gather: Gather, broadcast: Broadcast | None) -> Result:
    """The result of `work` on rank 0; an error is raised on all. broadcast: a gather of objects takes, on every rank,
    the memory of the largest value once per rank; without it, `gather` is used all the same."""
    found: list[Result] = []
    shared(lambda: found.append(work()) if rank == 0 else None, gather)
    return broadcast(found)[0] if broadcast else gather(found)[0][0]


def shared(work: Callable[[], Result], gather: Gather) -> list[Result]:
    """The result of `work` on each rank; the first DataError of any rank is raised on all."""
    outcomes = gather(_outcome(work))
    for _, failed in outcomes:
        if failed is not None:
            raise failed
    return [result for result, _ in outcomes]


def _outcome(work: Callable[[], Result]) -> tuple[Any, DataError | None]:
    """The result of `work`, or the DataError that it ended with, which is one of its own or of the storage."""
    try:
        return work(), None
    except DataError as error:
        return None, error
    except Exception as error:
        if verdict(error) is None:
            raise
        return None, storage_failure("data.shards", error)
