"""Names a rank that holds the others up: slower in its own work, log line after log line.

In lockstep every rank's step takes as long as the slowest one's, and the wait shows wherever the ranks exchange. Own
work is therefore the time in `data`, which has no collective, and in the other sections the CPU time of the training
thread: a rank that waits does not compute. On a GPU that tells nothing of the device, and only `data` is looked at.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..distributed.process_group import Ranks
from .phase_timer import Times

WORK = ("data", "forward", "backward", "optimizer")
LINES = 3
"""Log lines in a row after which a rank is named."""
SHARE, SPREAD = 0.2, 6.0
"""How much longer than the others' median counts: a share of the step, and so many of their median deviations."""


class Stragglers:
    """hosts: of every rank; report: takes the event that names one."""

    def __init__(self, ranks: Ranks, hosts: Sequence[str], report: Callable[[Mapping[str, Any]], None]) -> None:
        self.ranks, self.hosts, self.report = ranks, hosts, report
        self._suspect: int | None = None
        self._lines = 0

    def rank_work(self, times: Times) -> list[float]:
        """This rank's seconds a step in each section of WORK."""
        cpu = self.ranks.device.type == "cpu"
        mine = [times.wall.get("data", 0.0), *(times.cpu.get(name, 0.0) if cpu else 0.0 for name in WORK[1:])]
        return [seconds / max(times.steps, 1) for seconds in mine]

    def collect(self, step: int, times: Times, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        """Metrics of the ranks' own work since the last line, seconds a step. rows: every rank's `rank_work`. For all
        ranks, at log lines."""
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
            worst = max(range(len(WORK)), key=lambda section: rows[slow][section] - usual[section])
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
