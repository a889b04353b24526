"""Items made by a process of its own: in order, with its errors, and nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from bifrost.data import DataError
from bifrost.data.processes import from_process


def count(to: int) -> Iterator[int | tuple[int, str]]:
    yield os.getpid(), "x" * 200_000  # more than a pipe holds
    yield from range(to)


def fail(number: int) -> Iterator[int]:
    yield number
    raise ValueError(f"at {number}")


def die() -> Iterator[int]:
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)


def test_items_in_order_from_another_process() -> None:
    (process, text), *rest = from_process(count, 1000)
    assert process != os.getpid() and len(text) == 200_000 and rest == list(range(1000))
    assert not psutil.pid_exists(process)


def test_an_error_is_raised_here() -> None:
    items = from_process(fail, 3)
    assert next(items) == 3
    with pytest.raises(ValueError, match="at 3"):
        next(items)


def test_a_process_that_dies() -> None:
    items = from_process(die)
    assert next(items) == 1
    with pytest.raises(DataError, match="a worker process died"):
        next(items)


def test_a_loop_that_is_left_early_leaves_no_process() -> None:
    items = from_process(count, 10**9)
    process, _ = next(items)
    items.close()
    for _ in range(100):
        if not psutil.pid_exists(process):
            break
        time.sleep(0.01)
    assert not psutil.pid_exists(process)
