"""Current phase of this rank's step, and the time per phase.

The training thread only sets attributes; the watchdog thread and the log lines read them.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch.profiler import record_function

STEP = ("data", "forward", "backward", "exchange", "optimizer")
"""Phases of a step; any other phase, such as `save`, is outside the step and may take long."""


@dataclass(frozen=True)
class Times:
    """Seconds per phase since the last call of `take`: wall time and CPU time of the training thread; steps done."""

    wall: dict[str, float]
    cpu: dict[str, float]
    steps: int

    @property
    def step_s(self) -> float:
        """Seconds per step."""
        return sum(self.wall.get(name, 0.0) for name in STEP) / max(self.steps, 1)


class PhaseTimer:
    """`with phase("data"): …` around each phase; `step_done` after each step."""

    def __init__(self) -> None:
        self.name = "start"
        """The current phase, or `after NAME` between two."""
        self.step = 0
        """Steps done."""
        self.entered = 0
        """Phases entered: equal on all ranks that are at the same point."""
        self.timeout_class: Literal["start", "long", "step"] = "start"
        """Which timeout applies until the next step is done: first step, work outside the step (`long`), or neither."""
        self.last_step = time.monotonic()
        """time.monotonic() at the end of the last step."""
        self.on_steady_state: Callable[[], None] = lambda: None
        """Called at the end of the first step, and of a step with work outside it."""
        self.longest_between = 0.0
        """Seconds of the longest work between two steps, such as a validation or previews; saves are timed by their
        manager."""
        self._steps = 0
        self._durations: deque[float] = deque(maxlen=100)
        self._wall: dict[str, float] = defaultdict(float)
        self._cpu: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a phase, which also appears under its name in a profiler trace."""
        if name not in STEP:
            self.timeout_class = "start" if self.timeout_class == "start" else "long"
        self.name = name
        self.entered += 1
        wall, cpu = time.perf_counter(), time.thread_time()
        with record_function(f"bifrost.{name}"):
            yield
        seconds = time.perf_counter() - wall
        self._wall[name] += seconds
        if name not in (*STEP, "save"):
            self.longest_between = max(self.longest_between, seconds)
        self._cpu[name] += time.thread_time() - cpu
        self.name = f"after {name}"

    def step_done(self, step: int) -> None:
        """Record that `step` steps are done; call it before work outside the step, such as a save."""
        now = time.monotonic()
        steady = self.timeout_class == "step"
        if steady:
            self._durations.append(now - self.last_step)
        self.step, self.last_step, self.timeout_class = step, now, "step"
        self._steps += 1
        if not steady:
            self.on_steady_state()

    def median_step(self) -> float | None:
        """Median seconds per step; None while fewer than five are known."""
        durations = list(self._durations)
        return statistics.median(durations) if len(durations) >= 5 else None

    def take(self) -> Times:
        """Times since the last call."""
        times = Times(dict(self._wall), dict(self._cpu), self._steps)
        self._wall.clear()
        self._cpu.clear()
        self._steps = 0
        return times
