"""Slurm's own commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from .errors import SlurmError

ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD")

PAUSES_S = (1, 2, 5, 10, 20, 40, 80, 120)
"""Before Slurm is asked again: a controller that the end of a large job keeps busy answers within minutes."""
REFUSED = re.compile(
    "invalid|denied|disabled|not permitted|pending execution|already complet|configuration|not found", re.I
)
"""Answers that no other try changes."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job."""

    state: str
    """PENDING, RUNNING, COMPLETED, …"""
    reason: str
    """Why it waits or ended; `None` where Slurm gives none."""
    nodes: str
    """Its nodes in Slurm's notation, empty while it waits."""
    elapsed: str
    excluded: str
    """Nodes that it may not use, in Slurm's notation."""
    ends_at: float | None
    """Unix time of its limit, or of its end; `None` without one."""

    @property
    def alive(self) -> bool:
        return self.state in ALIVE


def submit(script: Path, after: str | None = None) -> str:
    """Submit a script; returns the job id. With `after`, it waits for the end of that job."""
    if after is None:  # a person is there, who sees whether Slurm has taken it
        answer = _once("sbatch", "--parsable", str(script))
    else:
        command = ("sbatch", "--parsable", f"--dependency=afterany:{after}", str(script))
        answer = _slurm(*command, done=lambda: _successor(after))
    return answer.split(";")[0].strip()


def _successor(job: str) -> str | None:
    """The job that waits for the end of `job`: Slurm may have taken it without being able to say so."""
    lines = _slurm("squeue", "--noheader", "--states=PENDING", "--format=%i %E").splitlines()
    return next((line.split()[0] for line in lines if re.search(rf"afterany:{job}\b", line)), None)


def job_state(job: str) -> JobState | None:
    """State of a job; None when Slurm no longer knows it. Of an array, that of its first element still alive."""
    try:
        shown = _slurm("scontrol", "--oneliner", "show", "job", job)
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    states = []
    for line in shown.splitlines():
        found = dict(re.findall(r"(?:^|(?<= ))(JobState|Reason|NodeList|ExcNodeList|RunTime|EndTime)=(\S+)", line))
        if found:
            fields = {name: value.replace("(null)", "") for name, value in found.items()}
            nodes, excluded = fields.get("NodeList", ""), fields.get("ExcNodeList", "")
            end, elapsed = _unix(fields.get("EndTime", "")), fields.get("RunTime", "")
            states.append(JobState(fields["JobState"], fields.get("Reason", "None"), nodes, elapsed, excluded, end))
    running = sorted((state for state in states if state.alive), key=lambda state: state.state == "PENDING")
    return next(iter([*running, *states]), None)


def waiting_jobs() -> dict[str, str]:
    """Id of every job that waits, of an array its own, and why. SlurmError where Slurm does not answer."""
    lines = _once("squeue", "--noheader", "--states=PENDING,REQUEUED,REQUEUE_HOLD", "--format=%F %r").splitlines()
    return dict(line.split(maxsplit=1) for line in lines if " " in line.strip())


def requeue(job: str) -> None:
    try:
        _slurm("scontrol", "requeue", job)
    except SlurmError as error:
        if "pending execution" not in str(error):  # an earlier try was heard
            raise


def exclude_nodes(job: str, nodes: list[str]) -> None:
    """Let a waiting job start on none of `nodes`, and on all others."""
    _slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")


def signal_ranks(job: str, signal: str) -> None:
    """A signal to the ranks of a job, not to its script."""
    _slurm("scancel", f"--signal={signal}", job)


def cancel(job: str, waiting_only: bool = False) -> None:
    _slurm("scancel", *(["--state=PENDING"] if waiting_only else []), job)


def _slurm(*command: str, done: Callable[[], str | None] = lambda: None) -> str:
    """What a command prints. One that Slurm does not answer is tried again for some minutes, unless `done` says what
    an earlier try has brought about; SlurmError when it is refused, or never answered."""
    for pause in PAUSES_S:
        try:
            return _once(*command)
        except SlurmError as error:
            if REFUSED.search(str(error)):
                raise
            if pause == PAUSES_S[0]:
                print(f"bifrost: {error}; asking again, for {sum(PAUSES_S):.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        if answer := done():
            return answer
    return _once(*command)


def _once(*command: str) -> str:
    # A job that is submitted from within a job must not take that one's variables for options.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    try:
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} not found: run this where Slurm's commands are") from None
    if ended.returncode:
        problem = " ".join(ended.stderr.split()).removeprefix(f"{command[0]}: ").removeprefix("error: ")
        raise SlurmError(f"{command[0]}: {problem or f'exit code {ended.returncode}'}")
    return ended.stdout


def _unix(when: str) -> float | None:
    """Unix time of Slurm's local one; None for `Unknown`."""
    try:
        return datetime.fromisoformat(when).timestamp()
    except ValueError:
        return None
