"""When a run worked, waited and lost time: its starts and stops as stretches of the clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = {
    "step": ("#009e73", "steps"),
    "data_wait": ("#56b4e9", "waiting for data"),
    "save": ("#cc79a7", "waiting for saves"),
    "startup": ("#e6c200", "starting"),
    "recovery": ("#999999", "down, and starting again"),
    "lost": ("#d55e00", "steps done twice"),
    "other": ("#d9d9d9", "other"),
}
"""Kind of goodput -> colour, label."""


@dataclass(frozen=True)
class Stretch:
    """Unix times, and a kind of KINDS."""

    begin: float
    end: float
    kind: str


@dataclass
class Start:
    """One start. begin: of its process; ready: for its first step; seen: its last sign of life."""

    begin: float
    ready: float
    seen: float
    step: int
    ranks: int
    reached: int
    outcome: str = "no word"
    lost_s: float = 0.0
    lost_steps: int = 0


def starts(records: Iterable[Mapping[str, Any]]) -> list[Start]:
    """The starts of a run, in order, each with what a roll-back or the next start found it to have lost."""
    found: list[Start] = []
    for record in records:
        when, event = record.get("time", 0.0), record.get("event")
        if event == "start":
            begin = when - record.get("startup_s", 0.0)
            if found:
                last = found[-1]
                last.lost_s += record.get("lost_s", 0.0)
                last.lost_steps += record.get("lost_steps", 0)
                if record.get("downtime_s"):
                    last.seen = max(last.seen, begin - record["downtime_s"])
            found.append(Start(begin, when, when, record["step"], record.get("ranks", 1), record["step"]))
        elif found:
            last = found[-1]
            last.seen = max(last.seen, when)
            last.reached = max(last.reached, record.get("step", 0))
            if event == "end":
                last.outcome = record["outcome"]
            elif event == "hang":
                last.outcome = "hung"
            elif event == "rollback":
                last.lost_s += record.get("lost_s", 0.0)
                last.lost_steps += record.get("lost_steps", 0)
    return found


def stretches(all_starts: Sequence[Start]) -> list[Stretch]:
    """Starting, steps, what of them was lost (drawn at their end), and the time between two starts, which is nobody's
    loss where the one before had finished."""
    found: list[Stretch] = []
    for before, start in zip([None, *all_starts], all_starts, strict=False):
        if before is None:
            found.append(Stretch(start.begin, start.ready, "startup"))
        else:
            found.append(Stretch(before.seen, start.ready, "other" if before.outcome == "finished" else "recovery"))
        good = max(start.ready, start.seen - start.lost_s)
        found.append(Stretch(start.ready, good, "step"))
        found.append(Stretch(good, start.seen, "lost"))
    return [each for each in found if each.end > each.begin]
