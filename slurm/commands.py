"""Slurm's own commands."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ..data.retry import retrying
from .errors import SlurmError

ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD")

ANSWER_S = 100.0
"""For one answer: longer than Slurm's own time limit of a message, also where a large site has raised that."""
PATIENCE_S = 280.0
"""Seconds of pauses in all before Slurm is given up on: a controller that the end of a large job keeps busy answers
within minutes."""
GIVE_UP_S = 600.0
"""The most for all tries at a command, those included that ANSWER_S ended."""
REFUSED = re.compile(
    "invalid|denied|disabled|not permitted|pending execution|already complet|configuration|not found"
    "|allocation failure|exceed|violates|more processors|must specify|unable to open file",
    re.I,
)
"""Answers that no other try changes."""
UNAVAILABLE = "node configuration is not available"
AWAY = ("down", "drain", "fail", "maint", "reboot", "unknown", "power")
"""States of nodes that may come back."""

log = logging.getLogger(__name__)


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


def check_request(script: str, partition: str | None, least: int) -> None:
    """SlurmError when Slurm would take a job with this script's text and never start it, or refuses it.

    partition: what the script asks for, None: the default. least: nodes without which it does not start. Where nodes
    of the partition are down or drained, a job may wait for them.
    """
    try:
        _once("sbatch", "--test-only", stdin=script)
    except SlurmError as error:
        if UNAVAILABLE in str(error):
            counts = _node_counts(partition)
            away = sum(count for state, count in counts if state.startswith(AWAY))
            if not away or sum(count for _, count in counts) < least:
                raise SlurmError(f"{error}; it would wait for ever: see sinfo, and ask for less") from error
            log.warning("%s: %d nodes of the partition are down or drained, the job waits for them", error, away)
        elif REFUSED.search(str(error)):
            raise
        # Else it does not answer: the submission itself says so.


def _node_counts(partition: str | None) -> list[tuple[str, int]]:
    """State and number of the nodes of a partition, None: the default one."""
    words = [line.split() for line in _once("sinfo", "--noheader", "--format=%P %T %D").splitlines()]
    mine = [row for row in words if (row[0].rstrip("*") == partition if partition else row[0].endswith("*"))]
    return [(state, int(count)) for _, state, count in mine]


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
    lines = _once("squeue", "--noheader", "--states=PENDING", "--format=%i %E").splitlines()
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
    begun, tries = time.monotonic(), 0

    def ask() -> str:
        nonlocal tries
        tries += 1
        if tries > 1 and (answer := done()):
            return answer
        try:
            return _once(*command)
        except SlurmError as error:
            if time.monotonic() - begun > GIVE_UP_S:
                raise SlurmError(str(error)) from None
            raise

    return retrying(ask, "Slurm", PATIENCE_S)


def _once(*command: str, stdin: str | None = None) -> str:
    """What a command prints; SlurmError, which a ConnectionError has caused unless another try changes nothing."""
    # A job that is submitted from within a job must not take that one's variables for options.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    try:
        ended = subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=environment, check=False, timeout=ANSWER_S
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} not found: run this where Slurm's commands are") from None
    except subprocess.TimeoutExpired:
        problem = f"{command[0]}: no answer within {ANSWER_S:.0f} s; see scontrol ping"
        raise SlurmError(problem) from ConnectionError(problem)
    if ended.returncode:
        problem = " ".join(ended.stderr.split()).removeprefix(f"{command[0]}: ").removeprefix("error: ")
        problem = f"{command[0]}: {problem or f'exit code {ended.returncode}'}"
        raise SlurmError(problem) from None if REFUSED.search(problem) else ConnectionError(problem)
    return ended.stdout


def _unix(when: str) -> float | None:
    """Unix time of Slurm's local one; None for `Unknown`."""
    try:
        return datetime.fromisoformat(when).timestamp()
    except ValueError:
        return None
