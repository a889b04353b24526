"""The end of a hung run: every rank writes its status, one rank reads them and reports, and all exit.

Statuses go through the run folder, which is shared and may be slow: the work per rank does not grow with the number of
ranks, except for the reporting rank, which lists the folder and reads each status once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ...slurm.exit_codes import HUNG
from ...slurm.exit_record import record_outcome
from ...slurm.io import write_json
from .metrics import MetricsFile
from .phase_timer import PhaseTimer
from .stacks import RankStatus, listed, read_statuses, recorded_collectives, suspect_rank, thread_at, write_status

COLLECTION_S = 10.0
"""Wait for the statuses of up to AT_ONCE ranks; proportionally longer for more ranks."""
AT_ONCE = 128


def collection_timeout_s(ranks: int) -> float:
    """Seconds in which the statuses of that many ranks are written."""
    return COLLECTION_S * max(1.0, ranks / AT_ONCE)


def exit_timeout_s(ranks: int) -> float:
    """Seconds after which a hung rank is ended, even if its storage is blocked."""
    return 3 * collection_timeout_s(ranks)


def report_exit(line: str, host: str | None = None) -> None:
    """Print and record why this rank exits. host: the suspect node."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    record_outcome(HUNG, line, host=host)


@dataclass(frozen=True)
class HangReport:
    """Report of rank `rank`. folder: for the statuses. hosts: of every rank. training: id of the training thread.
    stacks: an open file for this rank's. stalled_s, bound_s: how long it has waited, and might."""

    rank: int
    hosts: Sequence[str]
    folder: Path
    phases: PhaseTimer
    training: int
    stacks: TextIO
    stalled_s: float
    bound_s: float

    def collect_and_report(self) -> None:
        """Write this rank's status and return when it may exit. Raises OSError."""
        trace, collectives, collective = recorded_collectives()
        status = RankStatus(
            rank=self.rank,
            host=self.hosts[self.rank],
            pid=os.getpid(),
            step=self.phases.step,
            phase=self.phases.name,
            stalled_s=self.stalled_s,
            entered=self.phases.entered,
            collectives=collectives,
            collective=collective,
            at=thread_at(self.training),
        )
        write_status(self.folder, status, self.stacks, trace)
        begun, window = time.monotonic(), collection_timeout_s(len(self.hosts))
        # Rank 0 reports if it responds. Other ranks only poll for its report until the time is up.
        if self.rank == 0:
            self._wait(lambda: len(listed(self.folder)) == len(self.hosts), begun + window)
        else:
            self._wait(self._reported, begun + window)
        if not self._reported() and listed(self.folder)[0] == self.rank:
            # Exactly one rank reports, even if the ranks see the folder differently.
            with suppress(FileExistsError), open(self.folder / "reporter", "x") as claim:
                claim.write(f"{self.rank}\n")
                self._report(begun + 2 * window)
        self._wait(self._reported, begun + 2 * window)

    def _reported(self) -> bool:
        return (self.folder / "report.json").exists()

    def _wait(self, over: Callable[[], bool], deadline: float) -> None:
        while not over() and time.monotonic() < deadline:
            time.sleep(collection_timeout_s(len(self.hosts)) / 20)
            os.utime(self.folder)  # makes a network file system refresh the folder listing

    def _report(self, deadline: float) -> None:
        statuses = read_statuses(self.folder)
        rank, clause = suspect_rank(statuses, self.hosts)
        run = self.folder.parents[1]
        first = next((status for status in statuses if status.rank == rank), None)
        event = {
            "event": "hang",
            "step": statuses[0].step,
            "rank": rank,
            "host": self.hosts[rank] if rank is not None else None,
            "phase": first.phase if first else None,
            "collective": statuses[0].collective,
            "stalled_s": self.stalled_s,
            "timeout_s": self.bound_s,
            "stacks": str(self.folder.relative_to(run)),
        }
        waited = f"no step for {self.stalled_s:.0f} s (bound {self.bound_s:.0f} s)"
        report_exit(f"{waited}: {clause}; stacks in {self.folder}, ended with code {HUNG}", event["host"])
        MetricsFile(run / "metrics.jsonl").write(event)
        # Ranks exit once they see the report, and the first exit may end all others: write everything before it.
        recorded = sum(status.collective is not None for status in statuses)
        self._wait(lambda: len(listed(self.folder, ".collectives.json")) >= recorded, deadline)
        write_json(self.folder / "report.json", event | {"reason": clause})
