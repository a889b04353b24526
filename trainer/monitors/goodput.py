"""Goodput of a run over all attempts, computed from `metrics.jsonl` alone.

Time is split into `step` (productive: steps that count, without waiting for data), `data_wait`, `startup` (first
attempt, up to its first step), `recovery` (from an attempt's last sign of life until the next one is ready), `save`
(time for which a save blocked training), `lost` (steps that had to be repeated) and `other` (previews, validations,
shutdown). ETTR, the effective training time ratio, is `step` divided by the total.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ...slurm.io import write_json
from .columns import Lines, blocks
from .metrics import MetricsFile, iter_metrics

FILE = "goodput.json"
KINDS = ("step", "data_wait", "startup", "recovery", "save", "lost", "other")

NOTHING_BEFORE = {"downtime_s": 0.0, "kept_s": 0.0, "lost_s": 0.0, "lost_steps": 0}
"""Fields of the first `start` event."""


class Sign(NamedTuple):
    """A sign of life of an earlier attempt: Unix time, and steps done by then."""

    time: float
    step: int


class Ledger:
    """Accumulates a run's records in order; at first those of lists."""

    def __init__(self, records: Iterable[list[dict[str, Any]]] = ()) -> None:
        self.starts = self.step = self.lost_steps = 0
        self._seconds = dict.fromkeys(KINDS[:-1], 0.0)
        self._begun: float | None = None
        self._seen = self._idle = 0.0
        self._finished = False
        for part in blocks(records):
            if isinstance(part, Lines):
                self.add_lines(part)
            else:
                self.add(part)

    def add(self, record: Mapping[str, Any]) -> None:
        kind, seconds = record.get("event"), self._seconds
        if kind == "start":
            self.starts += 1
            if self._begun is None:
                self._begun = record["time"] - record["startup_s"]
                seconds["startup"] += record["startup_s"]
            elif self._finished:  # finished and later extended: the idle time in between does not count
                self._idle += record.get("downtime_s", 0.0)
                seconds["startup"] += record["startup_s"]
            else:
                seconds["recovery"] += record.get("downtime_s", 0.0) + record["startup_s"]
        elif kind == "checkpoint":
            seconds["save"] += record.get("blocked_s", record["seconds"])
        elif kind is None and "step_s" in record:
            steps, wait = record["step"] - self.step, record.get("data_wait_s", 0.0)
            seconds["step"] += (record["step_s"] - wait) * steps
            seconds["data_wait"] += wait * steps
            self.step = record["step"]
        if _is_restart(record):
            seconds["step"] += record.get("kept_s", 0.0)
            seconds["lost"] += record.get("lost_s", 0.0)
            self.lost_steps += record.get("lost_steps", 0)
            self.step = _step(record)
        self._finished = record.get("outcome") == "finished"
        self._seen = max(self._seen, record.get("time", 0.0))

    def add_lines(self, lines: Lines) -> None:
        """`add` of metric lines."""
        import numpy as np

        rows = zip(lines.steps, lines.values("step_s"), lines.values("data_wait_s"), strict=True)
        timed = [(step, step_s, wait or 0.0) for step, step_s, wait in rows if step_s is not None]
        if timed:
            reached, step_s, wait = map(np.array, zip(*timed, strict=True))
            steps, seconds = np.diff(reached, prepend=self.step), self._seconds
            # Added in order, as by `add`: equal to the last bit.
            seconds["step"] = float(np.cumsum([seconds["step"], *((step_s - wait) * steps)])[-1])
            seconds["data_wait"] = float(np.cumsum([seconds["data_wait"], *(wait * steps)])[-1])
            self.step = timed[-1][0]
        self._finished = False
        self._seen = max(self._seen, *(when or 0.0 for when in lines.values("time")))

    def summary(self) -> dict[str, Any]:
        """`wall_s` since the first start began, `ettr`, `seconds` a kind, `starts`, `step`, `lost_steps`; all of them
        up to the last record, at the Unix time `time`."""
        wall = max(self._seen - self._begun - self._idle, 1e-9) if self._begun is not None else 1e-9
        seconds = {**self._seconds, "other": max(0.0, wall - sum(self._seconds.values()))}
        return {
            "time": self._seen,
            "wall_s": wall,
            "ettr": seconds["step"] / wall,
            "seconds": seconds,
            "attempts": self.starts,
            "step": self.step,
            "lost_steps": self.lost_steps,
        }


def summary(run: str | Path) -> dict[str, Any]:
    """`Ledger.summary` of a run folder. Raises OSError."""
    return Ledger(iter_metrics(Path(run) / "metrics.jsonl")).summary()


class AccountedMetrics(MetricsFile):
    """A metrics file with the `ettr` so far in each line, and the ledger in `goodput.json`."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._ledger = Ledger()
        self._writing = threading.Lock()

    def resume(self, step: int, begun: float, owner: Mapping[str, Any] | None) -> dict[str, float]:
        """Rewind to `step` for an attempt whose process started at Unix time `begun`, or for a rollback now; return the
        fields of the `start` or `rollback` event that describe the time before. owner: of the lock left by a previous
        attempt that died. Raises OSError."""
        before = _Before(step)

        def kept() -> Iterator[list[dict[str, Any]]]:
            for records in iter_metrics(self.path):
                for record in records:
                    before.add(record)
                yield [record for record in records if "event" in record or record.get("step", 0) <= step]

        ledger = Ledger(kept())
        self.rewind(step)
        self._ledger = ledger
        return before.fields(begun, owner)

    def write(self, record: Mapping[str, Any]) -> None:
        with self._writing:  # background saves report from their own thread
            record = {"time": time.time(), **record}
            self._ledger.add(record)
            if "event" not in record:
                record["ettr"] = self._ledger.summary()["ettr"]
            super().write(record)

    def store(self) -> None:
        """Write `goodput.json`, whole or not at all: for rank 0, off the training thread. No failure is raised: the
        metrics file has it all."""
        with suppress(OSError):
            write_json(self.path.with_name(FILE), self._ledger.summary())


def _is_restart(record: Mapping[str, Any]) -> bool:
    """Whether the lines after this one continue from an earlier step: a start or a rollback."""
    return record.get("event") in ("start", "rollback")


def _step(record: Mapping[str, Any]) -> int:
    """Steps done after this record."""
    return record.get("to", record["step"])


class _Before:
    """The time before a resume from `step`, or a rollback to it, from all records in order."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._restart: Mapping[str, Any] | None = None
        self._accounted: Mapping[str, Any] = {}
        """Up to this record, kept lines account for the time."""
        self._last = Sign(0.0, 0)
        """The latest time and the highest step of the previous attempt."""
        self._saves: list[tuple[float, float]] = []
        """Checkpoints: Unix time, and seconds that blocked training."""

    def add(self, record: Mapping[str, Any]) -> None:
        if _is_restart(record):
            self._restart = self._accounted = record
            self._last = Sign(record["time"], _step(record))
        elif self._restart is not None:
            if "event" not in record and record["step"] <= self._step:
                self._accounted = record
            if "step" in record:
                self._sign(Sign(record["time"], _step(record)))
        if record.get("event") == "checkpoint":
            self._saves.append((record["time"], record.get("blocked_s", record["seconds"])))

    def _sign(self, sign: Sign) -> None:
        self._last = Sign(max(self._last.time, sign.time), max(self._last.step, sign.step))

    def fields(self, begun: float, owner: Mapping[str, Any] | None) -> dict[str, float]:
        """Time of the previous attempt after its last kept line: seconds of steps up to `step` without a line
        (`kept_s`), seconds and number of steps to repeat, and seconds from its last sign of life to `begun`. owner: see
        `AccountedMetrics.resume`."""
        if self._restart is None:
            return NOTHING_BEFORE
        if owner and owner.get("step") is not None and owner["started"] <= self._restart["time"]:
            self._sign(Sign(owner["beat"], owner["step"]))
        accounted, step = self._accounted, self._step
        saves = sum(seconds for when, seconds in self._saves if when > accounted["time"])
        spent = max(0.0, self._last.time - accounted["time"] - saves)
        reached = max(step, self._last.step)
        lost = (reached - step) / max(reached - _step(accounted), 1)
        return {
            "downtime_s": max(0.0, begun - self._last.time),
            "kept_s": spent * (1 - lost) if step > _step(accounted) else 0.0,
            "lost_s": spent * lost,
            "lost_steps": reached - step,
        }
