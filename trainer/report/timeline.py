"""When a run trained, waited and lost time: its attempts, as intervals of the clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..monitors.columns import Lines

KINDS = {
    "step": ("#009e73", "steps"),
    "data_wait": ("#56b4e9", "waiting for data"),
    "save": ("#cc79a7", "waiting for saves"),
    "startup": ("#e6c200", "starting"),
    "recovery": ("#999999", "down and restarting"),
    "lost": ("#d55e00", "steps to repeat"),
    "other": ("#d9d9d9", "other"),
}
"""Kind of goodput -> colour, label."""


@dataclass(frozen=True)
class Interval:
    """Unix times, and a kind of KINDS."""

    begin: float
    end: float
    kind: str


@dataclass
class Attempt:
    """Unix times: begin of its process; ready for its first step; seen: its last sign of life."""

    begin: float
    ready: float
    seen: float
    step: int
    ranks: int
    reached: int
    outcome: str = ""
    """Empty until the attempt ends itself."""
    lost_s: float = 0.0
    lost_steps: int = 0

    def lose(self, record: Mapping[str, Any]) -> None:
        """Add the loss that a rollback or the next `start` records."""
        self.lost_s += record.get("lost_s", 0.0)
        self.lost_steps += record.get("lost_steps", 0)


class Attempts:
    """The attempts of a run, from its records in order."""

    def __init__(self) -> None:
        self.found: list[Attempt] = []

    def add(self, record: Mapping[str, Any]) -> None:
        when, event = record.get("time", 0.0), record.get("event")
        if event == "start":
            begin = when - record.get("startup_s", 0.0)
            if self.found:
                last = self.found[-1]
                last.lose(record)
                if record.get("downtime_s"):
                    last.seen = max(last.seen, begin - record["downtime_s"])
            self.found.append(Attempt(begin, when, when, record["step"], record.get("ranks", 1), record["step"]))
        elif self.found:
            last = self.found[-1]
            last.seen = max(last.seen, when)
            last.reached = max(last.reached, record.get("step", 0))
            if event == "end":
                last.outcome = record["outcome"]
            elif event == "hang":
                last.outcome = "hung"
            elif event == "rollback":
                last.lose(record)

    def add_lines(self, lines: Lines) -> None:
        """`add` of metric lines."""
        if self.found:
            last = self.found[-1]
            last.seen = max(last.seen, *(when or 0.0 for when in lines.values("time")))
            last.reached = max(last.reached, *lines.steps)


def intervals(found: Sequence[Attempt]) -> list[Interval]:
    """Start-up, steps, lost steps (drawn at the end of their attempt), and downtime; after a finished attempt, that is
    not a loss."""
    made: list[Interval] = []
    for before, attempt in zip([None, *found], found, strict=False):
        if before is None:
            made.append(Interval(attempt.begin, attempt.ready, "startup"))
        else:
            kind = "other" if before.outcome == "finished" else "recovery"
            made.append(Interval(before.seen, attempt.ready, kind))
        good = max(attempt.ready, attempt.seen - attempt.lost_s)
        made.append(Interval(attempt.ready, good, "step"))
        made.append(Interval(good, attempt.seen, "lost"))
    return [each for each in made if each.end > each.begin]
