"""Progress of long work with the time left: a bar on a terminal, otherwise a plain line every 30 s.

Everything goes to standard error, so that a command's output can be piped.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from .units import format_seconds

Item = TypeVar("Item")

QUIET_S = 1.5
"""Shorter work shows nothing."""
LINE_EVERY_S = 30.0
"""Interval between lines when standard error is not a terminal."""
BAR_EVERY_S = 0.2


class progress:
    """Context manager that reports progress from a background thread, also while a single item takes minutes.

    what: the work, such as `verifying`. total: number of `unit`s; None when nothing is counted and only the elapsed
    time is shown. done: units that an earlier attempt completed. shown: False on all ranks but the first.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "", done: int = 0, shown: bool = True) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self._before = done
        self._begun = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True) if shown else None

    def __enter__(self) -> progress:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()

    def advance(self, more: int = 1) -> None:
        """Count `more` units as done."""
        self.done += more

    def line(self) -> str:
        """`verifying: 120 of 400 shards, 2 min 10 s left`."""
        elapsed, new = time.monotonic() - self._begun, self.done - self._before
        if self.total is None or not new:
            time_shown = f"{format_seconds(round(elapsed))} so far"
        else:
            time_shown = f"{format_seconds(round(elapsed / new * (self.total - self.done)))} left"
        if self.total is None:
            return f"{self.what}: {time_shown}"
        return f"{self.what}: {self.done:,} of {self.total:,} {self.unit}".rstrip() + f", {time_shown}"

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        if not sys.stderr.isatty():
            while not self._over.wait(LINE_EVERY_S):
                print(self.line(), file=sys.stderr, flush=True)
        elif not self._over.wait(QUIET_S):
            count = () if self.total is None else (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            columns = (TextColumn("{task.description}"), *count, TimeElapsedColumn())
            # Results on a redirected standard output are not captured.
            redirect = sys.stdout.isatty()
            console = Console(stderr=True, markup=False, emoji=False)
            with Progress(*columns, console=console, transient=True, redirect_stdout=redirect) as bar:
                label = f"{self.what} {self.unit}".rstrip()
                task = bar.add_task(label, total=self.total, completed=self._before)
                while not self._over.wait(BAR_EVERY_S):
                    bar.update(task, completed=self.done)


def track(items: Iterable[Item], what: str, total: int, unit: str, shown: bool = True) -> Iterator[Item]:
    """Yield `items` and report `progress` as they are consumed."""
    with progress(what, total, unit, shown=shown) as taken:
        for item in items:
            yield item
            taken.advance()
