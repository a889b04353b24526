"""Status of each rank of a hung run, and the suspect rank that follows from them.

`RUN/stacks/START/` holds for each rank `rank-00000.txt` (Python stacks of all threads), `rank-00000.json` (its
position) and `rank-00000.collectives.json` (torch's flight recorder with the last collectives, about 1 MB);
`report.json` names the rank that is furthest behind.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from torch._C import _distributed_c10d

from ...data.atomic import write_atomic
from ...slurm.io import write_json
from ..distributed.process_group import BACKGROUND

OURS = tuple(f"{Path(__file__).parents[2] / room}{os.sep}" for room in ("trainer", "data", "kernels"))


@dataclass(frozen=True)
class RankStatus:
    """Status of one rank: `entered` and `collectives` count the phases and collectives started since process start."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    stalled_s: float
    entered: int
    collectives: int
    collective: str | None
    """The last collective, and whether it is finished; None if unknown."""
    at: str
    """Innermost line of the training thread in this project's code."""


def write_status(folder: Path, status: RankStatus, stacks: TextIO, collectives: bytes | None) -> None:
    """Write this rank's status to `folder`, the largest file last, each atomically. Raises OSError."""
    faulthandler.dump_traceback(stacks)
    name = f"rank-{status.rank:05d}"
    write_json(folder / f"{name}.json", asdict(status))
    if collectives:
        write_atomic(folder / f"{name}.collectives.json", collectives)


def listed(folder: Path, ending: str = ".json") -> list[int]:
    """Ranks with a file of that ending, in order."""
    named = re.compile(rf"rank-(\d+){re.escape(ending)}")
    return sorted(int(found[1]) for found in map(named.fullmatch, os.listdir(folder)) if found)


def read_statuses(folder: Path) -> list[RankStatus]:
    """Statuses so far, in rank order."""
    return [RankStatus(**json.loads((folder / f"rank-{rank:05d}.json").read_bytes())) for rank in listed(folder)]


def suspect_rank(statuses: Sequence[RankStatus], hosts: Sequence[str]) -> tuple[int | None, str]:
    """(rank that the others wait for, None if none is behind, and a clause with the reason).

    hosts: of every rank. The first suspect is a rank without a status, then the one that has entered the fewest
    phases, and among equals the fewest collectives.
    """
    silent = [rank for rank in range(len(hosts)) if rank not in {status.rank for status in statuses}]
    if silent:
        rest = f" nor do {len(silent) - 1} others" if len(silent) > 1 else ""
        return silent[
            0
        ], f"rank {silent[0]} on {hosts[silent[0]]} does not answer{rest}: it is gone, stopped or blocked"
    first = min(statuses, key=lambda status: (status.entered, status.collectives))
    behind = [a for a in statuses if (a.entered, a.collectives) == (first.entered, first.collectives)]
    where = f"in {first.phase} of step {first.step + 1}, at {first.at}"
    if len(statuses) == 1:
        return first.rank, f"rank {first.rank} on {first.host} is {where}"
    if len(behind) == len(statuses):
        # Nor does the job's record then name a host: between two nodes either may be at fault, or what connects them.
        network = "; check the network between the nodes with bifrost slurm preflight" if len(set(hosts)) > 1 else ""
        return None, f"no rank is behind the others: all are {where}, last collective {first.collective}{network}"
    others = max(statuses, key=lambda status: (status.entered, status.collectives))
    more = f" with {len(behind) - 1} others as far" if len(behind) > 1 else ""
    return first.rank, (
        f"rank {first.rank} on {first.host} is furthest behind{more}: {where}; the others wait in {others.phase},"
        f" last collective {others.collective}"
    )


def innermost(frame: FrameType | None) -> str:
    """`loop.py:81 run`: the innermost line of a thread in this project's code, else the innermost of all."""
    inner = frame
    while frame is not None and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    shown = frame or inner
    return f"{Path(shown.f_code.co_filename).name}:{shown.f_lineno} {shown.f_code.co_name}" if shown else "its end"


def thread_at(thread: int | None) -> str:
    """`innermost` of a running thread."""
    return innermost(sys._current_frames().get(thread or 0))


def recorded_collectives() -> tuple[bytes | None, int, str | None]:
    """Torch's flight recorder as JSON, number of collectives started, and the last one; (None, 0, None) without."""
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # of NCCL, and of the others
        try:
            text: bytes = getattr(_distributed_c10d, name)()
            # Only training's collectives: the background group may be further on some ranks.
            entries = [e for e in json.loads(text).get("entries", []) if e["process_group"][1] != BACKGROUND]
        except Exception:  # a private torch API: whatever it raises, the stacks matter more
            continue
        if entries:
            groups: dict[int, int] = {}
            for entry in entries:
                groups[entry["pg_id"]] = max(groups.get(entry["pg_id"], 0), entry["collective_seq_id"])
            last = max(entries, key=lambda entry: entry["record_id"])
            done = last.get("retired") or last.get("state") == "completed"
            return text, sum(groups.values()), f"{last['profiling_name']} ({'finished' if done else 'under way'})"
    return None, 0, None
