"""Time that a rank's thread spends in collectives: in the calls, and waiting for asynchronous ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist

NAMES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce_scatter_tensor",
)


class Clock:
    """Accumulated time in `seconds`; a collective called by another is counted once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False

    def timed(self, call: Callable) -> Callable:
        @wraps(call)
        def inner(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            self._inside, begun = True, time.perf_counter()
            try:
                result = call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begun
                self._inside = False
            return Waited(result, self) if hasattr(result, "wait") else result

        return inner

    @contextmanager
    def running(self) -> Iterator[Clock]:
        """Time the functions of `torch.distributed`, as called by DeepSpeed and this project. Enter before DeepSpeed is
        initialised, which keeps references to some of them."""
        before = {name: getattr(dist, name) for name in NAMES}
        for name, call in before.items():
            setattr(dist, name, self.timed(call))
        try:
            yield self
        finally:
            for name, call in before.items():
                setattr(dist, name, call)


class Waited:
    """An asynchronous collective whose `wait` is timed."""

    def __init__(self, work: Any, clock: Clock) -> None:
        self._work, self._clock = work, clock

    def wait(self, *args: Any) -> Any:
        return self._clock.timed(self._work.wait)(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
