"""Where this rank is in its step, and how long each part takes.

The training thread only sets attributes; the watchdog's thread and the log lines read them.
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
"""The parts of a step; any other section is work beside it, such as `save`, and may take long."""


@dataclass(frozen=True)
class Times:
    """Seconds a section since the last look, on the clock and of the training thread's own computing; steps done."""

    wall: dict[str, float]
    cpu: dict[str, float]
    steps: int

    @property
    def step_s(self) -> float:
        """Seconds a step."""
        return sum(self.wall.get(name, 0.0) for name in STEP) / max(self.steps, 1)


class PhaseTimer:
    """`with sections("data"): …` around each part; `step_done` after each step."""

    def __init__(self) -> None:
        self.name = "start"
        """The section under way, or `after NAME` between two."""
        self.step = 0
        """Steps done."""
        self.entered = 0
        """PhaseTimer entered: the same number on all ranks that are at the same place."""
        self.timeout_class: Literal["start", "long", "step"] = "start"
        """Until the next step is done: is it the first one, has there been work beside the step, or neither."""
        self.last_step = time.monotonic()
        """When the last step was done."""
        self.on_steady_state: Callable[[], None] = lambda: None
        """Called when the start, or a step with work beside it, is over."""
        self._steps = 0
        self._durations: deque[float] = deque(maxlen=100)
        self._wall: dict[str, float] = defaultdict(float)
        self._cpu: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A part of the step or work beside it, also under its name in a profiler's trace."""
        if name not in STEP:
            self.timeout_class = "start" if self.timeout_class == "start" else "long"
        self.name = name
        self.entered += 1
        wall, cpu = time.perf_counter(), time.thread_time()
        with record_function(f"bifrost.{name}"):
            yield
        self._wall[name] += time.perf_counter() - wall
        self._cpu[name] += time.thread_time() - cpu
        self.name = f"after {name}"

    def step_done(self, step: int) -> None:
        """`step` steps of the run are done: before anything beside the step, such as a save."""
        now = time.monotonic()
        ordinary = self.timeout_class == "step"
        if ordinary:
            self._durations.append(now - self.last_step)
        self.step, self.last_step, self.timeout_class = step, now, "step"
        self._steps += 1
        if not ordinary:
            self.on_steady_state()

    def median_step(self) -> float | None:
        """Seconds that a step usually takes; None while fewer than five are known."""
        durations = list(self._durations)
        return statistics.median(durations) if len(durations) >= 5 else None

    def take(self) -> Times:
        """The times since the last call."""
        times = Times(dict(self._wall), dict(self._cpu), self._steps)
        self._wall.clear()
        self._cpu.clear()
        self._steps = 0
        return times
