"""The two steps of the batch script around the ranks: on how many nodes they run, and what happens after them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from ..recipes import load_recipe
from . import commands, record
from .codes import BAD_NODE, DONE, FAILED, HUNG, LOCKED, LOST, STOPPED, USAGE
from .errors import SlurmError
from .exclusions import excluded
from .job import RECIPE, SCRIPT, Job, load_job, usable_nodes
from .site import load_site

FRUITLESS_STARTS = 3
"""Starts without a new checkpoint after which a run is no longer started again."""
REASONS = {
    FAILED: "exit code 1 of unknown cause",
    USAGE: "exit code 2, a setting to mend",
    LOST: "storage failed, or a loader's worker was killed",
    STOPPED: "stopped by a signal, saved",
    HUNG: "ended by the watchdog",
    BAD_NODE: "bad nodes",
    LOCKED: "another copy owns the run",
    128 + signal.SIGKILL: "a rank was ended by SIGKILL, for lack of memory perhaps",
}


def before(run: Path) -> int:
    """Note this start; returns the number of nodes to run on. SlurmError when the run is not to be started again."""
    job = load_job(run)
    recipe = load_recipe(run / RECIPE)
    (run / record.OUTCOME).unlink(missing_ok=True)
    step = record.newest_step(run)
    # A lost node or a preemption has the job started by Slurm itself: then nobody has counted before.
    if record.fruitless(record.starts(run, job.submitted), step) >= FRUITLESS_STARTS:
        reason = _crash_loop(step)
        record.write_stopped(run, FAILED, reason)
        raise SlurmError(reason)
    got = int(os.environ.get("SLURM_JOB_NUM_NODES", job.nodes[1]))
    nodes = usable_nodes(recipe, job.tasks_per_node, min(job.nodes[0], got), got)
    record.append(run, {"step": step, "nodes": nodes, "hosts": os.environ.get("SLURM_JOB_NODELIST")})
    return nodes


def after(run: Path, code: int) -> tuple[str, int]:
    """Decide what becomes of a job whose ranks ended with `code`, and do it.

    Returns a line that says what, and the code to end the job with.
    """
    # The requeue below ends this job, and this process with it, before it has said which nodes are to be left out.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    job = load_job(run)
    outcome = record.read_outcome(run)
    reason = REASONS.get(code) or _signal(code) or f"exit code {code}"
    if outcome:
        code, reason = outcome["code"], f"rank {outcome['rank']}: {outcome['reason']}"
    if code == DONE:
        return _end(job, "done", "all steps are done"), DONE
    if code in (USAGE, LOCKED) or (outcome and code == FAILED):
        return _stop(job, code, reason)
    if job.cancelled:
        return _end(job, "cancelled", "stopped by bifrost slurm cancel"), DONE
    state = commands.job_state(_id())
    if state and state.state != "RUNNING" and state.reason != "TimeLimit":
        # Somebody has ended or requeued it, or Slurm has.
        record.append(run, {"code": code, "decision": "left", "reason": state.state})
        return f"the job is {state.state}: left to Slurm", code
    return _start_again(job, code, reason)


def _start_again(job: Job, code: int, reason: str) -> tuple[str, int]:
    left_out = _nodes_to_leave_out(job) if code == BAD_NODE else []
    record.append(job.path, {"code": code, "decision": "again", "reason": reason, "excluded": left_out})
    step = record.newest_step(job.path)
    if record.fruitless(record.starts(job.path, job.submitted), step) >= FRUITLESS_STARTS:
        return _stop(job, code, f"{_crash_loop(step)}; the last one: {reason}")
    if job.array:
        waiting = os.environ["SLURM_ARRAY_JOB_ID"]
        again = "the next element of the array goes on"
    else:
        try:
            commands.requeue(_id())
            waiting, again = _id(), "requeued"
        except SlurmError as error:
            job.id = waiting = commands.submit(job.path / SCRIPT, after=_id())
            job.save()
            again = f"goes on as job {waiting} ({error})"
    if left_out:
        commands.exclude_nodes(waiting, [*([job.exclude] if job.exclude else []), *left_out])
        again += f" without {', '.join(left_out)}"
    return f"{reason}: {again}, from step {step}", code


def _nodes_to_leave_out(job: Job) -> list[str]:
    """Nodes found bad; empty when the job was to run without all of them already."""
    known = {node for start in record.starts(job.path, job.submitted) for node in start.get("excluded", [])}
    found = excluded(job.path, load_site())
    return found if set(found) - known else []


def _stop(job: Job, code: int, reason: str) -> tuple[str, int]:
    record.write_stopped(job.path, code, reason)
    return _end(job, "stopped", reason), code


def _end(job: Job, decision: str, reason: str) -> str:
    record.append(job.path, {"decision": decision, "reason": reason})
    if job.array:
        commands.cancel(os.environ["SLURM_ARRAY_JOB_ID"], waiting_only=True)
    return f"{decision}: {reason}"


def _crash_loop(step: int) -> str:
    return (
        f"{FRUITLESS_STARTS} starts without a checkpoint beyond step {step}: not started again; see slurm/job.log, mend"
        " the cause, then bifrost slurm resume"
    )


def _signal(code: int) -> str | None:
    try:
        return f"a rank was ended by {signal.Signals(code - 128).name}"
    except ValueError:
        return None


def _id() -> str:
    return os.environ["SLURM_JOB_ID"]
