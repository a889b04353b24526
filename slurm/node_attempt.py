"""An attempt on a cluster without Slurm: recorded in the run folder by node 0, as the batch script does under Slurm."""

from __future__ import annotations

from pathlib import Path

from . import exit_record
from .errors import SlurmError
from .exit_codes import DONE, STOPPED, USAGE
from .exit_reason import ExitReason, read_reason
from .rank_env import host_name
from .requeue import MAX_RESTARTS_WITHOUT_PROGRESS


def begin(run: Path, nodes: int, since: float) -> str:
    """Record an attempt on `nodes` nodes and return its id.

    Raises SlurmError, and writes stopped.json, after MAX_RESTARTS_WITHOUT_PROGRESS attempts without a new checkpoint
    since the Unix time `since`. Those that were stopped by a signal do not count: a preemption is not the run's fault.
    """
    (run / exit_record.OUTCOME).parent.mkdir(parents=True, exist_ok=True)
    (run / exit_record.OUTCOME).unlink(missing_ok=True)
    history, step = exit_record.attempts(run, since), exit_record.newest_step(run)
    counted = [attempt for attempt in history if attempt.get("code") != STOPPED]
    if exit_record.restarts_without_progress(counted, step) >= MAX_RESTARTS_WITHOUT_PROGRESS:
        reason = (
            f"{MAX_RESTARTS_WITHOUT_PROGRESS} attempts without a checkpoint after step {step}: not started again; see"
            f" {run / exit_record.ATTEMPTS}, fix the cause, then render and apply the manifest again"
        )
        exit_record.write_stopped(run, USAGE, reason)
        raise SlurmError(reason)
    (run / exit_record.STOPPED).unlink(missing_ok=True)
    attempt = f"{host_name()}.{len(exit_record.attempts(run))}"
    exit_record.append(run, {"attempt": attempt, "step": step, "nodes": nodes})
    return attempt


def end(run: Path, code: int, attempt: str | None) -> ExitReason:
    """Why this node's ranks, which returned `code`, ended. attempt: its id on node 0, which records it."""
    found = read_reason(run, 128 - code if code < 0 else code)
    if attempt is not None:
        decision = "done" if found.code == DONE else "stopped" if found.final else "again"
        exit_record.append(run, {"attempt": attempt, "code": found.code, "decision": decision, "reason": found.reason})
        if decision == "stopped":
            exit_record.write_stopped(run, found.code, found.reason)
    return found
