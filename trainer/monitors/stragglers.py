"""Straggler detection: names a rank whose own work is slower over several consecutive log lines.

In lockstep every step takes as long as the slowest rank, and the wait shows up in whichever phase communicates. Rank
work is therefore the wall time of `data`, which has no collective, plus the training thread's CPU time in the other
phases, since a waiting rank does not compute. On a GPU, CPU time does not reflect the device, so only `data` counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..distributed.process_group import Ranks
from .phase_timer import Times

WORK = ("data", "forward", "backward", "optimizer")
LINES = 3
"""Consecutive log lines after which a rank is named."""
SHARE, SPREAD = 0.2, 6.0
"""Margin above the others' median: a fraction of the step time, and a multiple of their median deviation."""


class Stragglers:
    """hosts: of every rank. report: receives the straggler event."""

    def __init__(self, ranks: Ranks, hosts: Sequence[str], report: Callable[[Mapping[str, Any]], None]) -> None:
        self.ranks, self.hosts, self.report = ranks, hosts, report
        self._suspect: int | None = None
        self._lines = 0

    def rank_work(self, times: Times) -> list[float]:
        """This rank's seconds per step in each phase of WORK."""
        cpu = self.ranks.device.type == "cpu"
        mine = [times.wall.get("data", 0.0), *(times.cpu.get(name, 0.0) if cpu else 0.0 for name in WORK[1:])]
        return [seconds / max(times.steps, 1) for seconds in mine]

    def collect(self, step: int, times: Times, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        """Metrics of the rank work since the last line, in seconds per step. rows: every rank's `rank_work`. Call it on
        all ranks at log lines."""
        own = [sum(row) for row in rows]
        slowest = max(range(len(own)), key=own.__getitem__)
        others = [value for rank, value in enumerate(own) if rank != slowest]
        if others:
            usual = statistics.median(others)
            spread = statistics.median(abs(value - usual) for value in others)
            margin = max(SHARE * times.step_s, SPREAD * spread)
            self._judge(step, slowest if own[slowest] - usual > margin else None, rows)
        return {"rank_work_s_median": statistics.median(own), "rank_work_s_max": own[slowest], "slowest_rank": slowest}

    def _judge(self, step: int, slow: int | None, rows: Sequence[Sequence[float]]) -> None:
        self._lines = self._lines + 1 if slow is not None and slow == self._suspect else int(slow is not None)
        self._suspect = slow
        if slow is not None and self._lines == LINES:
            others = [row for rank, row in enumerate(rows) if rank != slow]
            usual = [statistics.median(column) for column in zip(*others, strict=True)]
            worst = max(range(len(WORK)), key=lambda phase: rows[slow][phase] - usual[phase])
            self.report(
                {
                    "event": "straggler",
                    "step": step,
                    "rank": slow,
                    "host": self.hosts[slow],
                    "phase": WORK[worst],
                    "seconds": rows[slow][worst],
                    "others_median_s": usual[worst],
                }
            )
