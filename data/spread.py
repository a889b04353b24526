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
Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(work: Callable[[Item], Result], items: Sequence[Item], rank: int, gather: Gather) -> list[Result]:
    """Results of `work` on every item, split among the ranks; an error of one rank is raised on all."""
    ranks = len(gather(None))

    def mine() -> list[Result]:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(work, items[rank::ranks]))

    found = shared(mine, gather)
    return [found[number % ranks][number // ranks] for number in range(len(items))]


def shared(work: Callable[[], Result], gather: Gather) -> list[Result]:
    """The result of `work` on each rank; the first DataError of any rank is raised on all."""
    try:
        found, failure = work(), None
    except DataError as error:
        found, failure = None, error
    except Exception as error:
        if verdict(error) is None:
            raise
        found, failure = None, storage_failure("data.shards", error)
    outcomes = gather((found, failure))
    for _, failed in outcomes:
        if failed is not None:
            raise failed
    return [result for result, _ in outcomes]
