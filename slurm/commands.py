"""Slurm's own commands."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .errors import SlurmError

ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD")


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

    @property
    def alive(self) -> bool:
        return self.state in ALIVE


def submit(script: Path, after: str | None = None) -> str:
    """Submit a script; returns the job id. With `after`, it waits for the end of that job."""
    dependency = [f"--dependency=afterany:{after}"] if after else []
    return _slurm("sbatch", "--parsable", *dependency, str(script)).split(";")[0].strip()


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
        fields = dict(re.findall(r"(?:^|(?<= ))(JobState|Reason|NodeList|RunTime)=(\S+)", line))
        if fields:
            nodes = fields.get("NodeList", "").replace("(null)", "")
            states.append(JobState(fields["JobState"], fields.get("Reason", "None"), nodes, fields.get("RunTime", "")))
    running = sorted((state for state in states if state.alive), key=lambda state: state.state == "PENDING")
    return next(iter([*running, *states]), None)


def requeue(job: str) -> None:
    _slurm("scontrol", "requeue", job)


def exclude_nodes(job: str, nodes: list[str]) -> None:
    """Let a waiting job start on none of `nodes`."""
    _slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")


def signal_ranks(job: str, signal: str) -> None:
    """A signal to the ranks of a job, not to its script."""
    _slurm("scancel", f"--signal={signal}", job)


def cancel(job: str, waiting_only: bool = False) -> None:
    _slurm("scancel", *(["--state=PENDING"] if waiting_only else []), job)


def _slurm(*command: str) -> str:
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
