"""Calls of Slurm's commands: sbatch, scontrol, squeue, scancel, sinfo."""

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
"""Timeout of one command: above Slurm's own message timeout, also where a large site has raised that."""
PATIENCE_S = 280.0
"""Total seconds of backoff before giving up: a controller that is busy ending a large job answers within minutes."""
GIVE_UP_S = 600.0
"""Upper bound on all attempts of one command together, including those that timed out after ANSWER_S."""
REFUSED = re.compile(
    "invalid|denied|disabled|not permitted|pending execution|already complet|configuration|not found"
    "|allocation failure|exceed|violates|more processors|must specify|unable to open file",
    re.I,
)
"""Errors that a retry does not change."""
UNREACHABLE = re.compile("(?:unable to contact slurm controller|could not establish a configuration source).*", re.I)
UNAVAILABLE = "node configuration is not available"
AWAY = ("down", "drain", "fail", "maint", "reboot", "unknown", "power")
"""Node states that may be temporary."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobState:
    """State of a job as Slurm reports it."""

    state: str
    """PENDING, RUNNING, COMPLETED, …"""
    reason: str
    """Why it is pending or ended; `None` if Slurm gives no reason."""
    nodes: str
    """Its nodes in Slurm's notation; empty while it is pending."""
    elapsed: str
    excluded: str
    """Excluded nodes, in Slurm's notation."""
    ends_at: float | None
    """Unix time of its time limit, or of its end; `None` without one."""

    @property
    def alive(self) -> bool:
        return self.state in ALIVE


def check_request(script: str, partition: str | None, least: int) -> None:
    """Raise SlurmError if Slurm would refuse a job with this script text, or accept it and never start it.

    partition: requested partition, None for the default. least: minimum number of nodes. A job may wait for nodes of
    the partition that are down or drained.
    """
    try:
        _once("sbatch", "--test-only", stdin=script)
    except SlurmError as error:
        if "generic resource" in str(error):
            raise SlurmError(
                f"{error}: these nodes have no such GPUs, see sinfo -o '%P %G'; on a CPU cluster give"
                " --gpus-per-node 0 --tasks-per-node N"
            ) from error
        if "invalid partition" in str(error).lower():
            raise SlurmError(f"{error}{_partitions()}") from error
        if UNAVAILABLE in str(error):
            counts = _node_counts(partition)
            away = sum(count for state, count in counts if state.startswith(AWAY))
            if not away or sum(count for _, count in counts) < least:
                raise SlurmError(f"{error}; it would never start: see sinfo, and request less") from error
            log.warning("%s: %d nodes of the partition are down or drained, the job waits for them", error, away)
        elif REFUSED.search(str(error)) or UNREACHABLE.search(str(error)):
            raise
        # Otherwise Slurm is busy: the submission itself reports that.


def _partitions() -> str:
    """The remedy for a wrong partition: the names of all; empty if Slurm does not answer."""
    try:
        names = sorted(set(_once("sinfo", "--noheader", "--format=%R").split()))
    except SlurmError:
        return ""
    return f"; give --partition as one of {', '.join(names)}" if names else ""


def _node_counts(partition: str | None) -> list[tuple[str, int]]:
    """(state, number of nodes) of a partition, None for the default one."""
    words = [line.split() for line in _once("sinfo", "--noheader", "--format=%P %T %D").splitlines()]
    mine = [row for row in words if (row[0].rstrip("*") == partition if partition else row[0].endswith("*"))]
    return [(state, int(count)) for _, state, count in mine]


def submit(script: Path, after: str | None = None, minutes: int = 0, held: bool = False) -> str:
    """Submit a script and return the job id. With `after`, the job depends on the end of that job. It begins in
    `minutes` at the earliest, and if it is `held`, not before `release`."""
    options = [*([f"--begin=now+{minutes}minutes"] if minutes else []), *(["--hold"] if held else [])]
    if after is None:  # submitted by a person, who sees whether Slurm accepted it
        answer = _once("sbatch", "--parsable", *options, str(script))
    else:
        command = ("sbatch", "--parsable", f"--dependency=afterany:{after}", *options, str(script))
        answer = _slurm(*command, done=lambda: _successor(after))
    return answer.split(";")[0].strip()


def _successor(job: str) -> str | None:
    """Id of the job that depends on `job`: Slurm may have accepted it although its reply was lost."""
    lines = _once("squeue", "--noheader", "--states=PENDING", "--format=%i %E").splitlines()
    return next((line.split()[0] for line in lines if re.search(rf"afterany:{job}\b", line)), None)


def job_state(job: str) -> JobState | None:
    """State of a job, None if Slurm no longer knows it; of an array, that of its first element still alive."""
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
    """Id of every pending job (of an array, the array's id) -> reason. Raises SlurmError if Slurm does not answer."""
    lines = _once("squeue", "--noheader", "--states=PENDING,REQUEUED,REQUEUE_HOLD", "--format=%F %r").splitlines()
    return dict(line.split(maxsplit=1) for line in lines if " " in line.strip())


def release(job: str) -> None:
    """Let a job that was submitted as held begin."""
    _slurm("scontrol", "release", job)


def requeue(job: str) -> None:
    try:
        _slurm("scontrol", "requeue", job)
    except SlurmError as error:
        if "pending execution" not in str(error):  # an earlier attempt succeeded
            raise


def exclude_nodes(job: str, nodes: list[str]) -> None:
    """Set the excluded nodes of a pending job to `nodes`."""
    _slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")


def signal_ranks(job: str, signal: str) -> None:
    """Send a signal to the ranks of a job, not to its batch script."""
    _slurm("scancel", f"--signal={signal}", job)


def cancel(job: str, waiting_only: bool = False) -> None:
    _slurm("scancel", *(["--state=PENDING"] if waiting_only else []), job)


def _slurm(*command: str, done: Callable[[], str | None] = lambda: None) -> str:
    """Output of a command, retried for some minutes while Slurm does not answer.

    done: returns the result if an earlier attempt took effect although its reply was lost. Raises SlurmError if Slurm
    refuses or never answers.
    """
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
    """Output of a command. Raises SlurmError, caused by a ConnectionError if a retry may help."""
    # A job submitted from within a job must not read the outer job's variables as options.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    try:
        ended = subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=environment, check=False, timeout=ANSWER_S
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} not found: run this on a host with Slurm's commands") from None
    except subprocess.TimeoutExpired:
        problem = f"{command[0]}: no answer within {ANSWER_S:.0f} s; see scontrol ping"
        raise SlurmError(problem) from ConnectionError(problem)
    if ended.returncode:
        problem = " ".join(ended.stderr.split()).removeprefix(f"{command[0]}: ").removeprefix("error: ")
        if found := UNREACHABLE.search(problem):
            problem = f"{found[0]}; check SLURM_CONF ({environment.get('SLURM_CONF', 'not set')}) and scontrol ping"
        problem = f"{command[0]}: {problem or f'exit code {ended.returncode}'}"
        raise SlurmError(problem) from None if REFUSED.search(problem) else ConnectionError(problem)
    return ended.stdout


def _unix(when: str) -> float | None:
    """Slurm's local time as Unix time; None for `Unknown`."""
    try:
        return datetime.fromisoformat(when).timestamp()
    except ValueError:
        return None
