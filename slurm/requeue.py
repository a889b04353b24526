"""Steps of the batch script before and after the ranks: choose the number of nodes, then finish, requeue or stop."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from ..recipes import RecipeError, load_recipe
from . import commands, exit_record
from .errors import SlurmError
from .exclusions import exclude, excluded
from .exit_codes import BAD_NODE, DONE, HUNG, USAGE
from .exit_reason import read_reason
from .job import RECIPE, SCRIPT, Job, load_job, usable_nodes, write_recipe
from .rank_env import expand_hosts
from .site import load_site

MAX_RESTARTS_WITHOUT_PROGRESS = 3
"""Consecutive attempts without a new checkpoint after which a run is stopped."""
MAX_HANGS_PER_NODE = 2
"""Hung attempts with the same suspect node after which that node is excluded."""
BATCH_STEP_FAILED = "slurm/batch_step_failures"
"""Written by the batch script if these steps could not run on its host, one line per attempt."""
OLD_BATCH_STEP_FAILED = "slurm/unable"
"""The same file of a job submitted by an earlier version."""


def before(run: Path) -> tuple[int, float | None]:
    """Record this attempt; return the number of nodes to run on, and the Unix time of the job's end (None: no limit).

    Raises SlurmError or RecipeError if the run must not be restarted.
    """
    try:
        nodes = _begin(run)
    except (RecipeError, SlurmError) as error:
        exit_record.write_stopped(run, USAGE, str(error))
        raise
    for name in (BATCH_STEP_FAILED, OLD_BATCH_STEP_FAILED, exit_record.STOPPED):
        (run / name).unlink(missing_ok=True)
    return nodes, _ends_at()


def _begin(run: Path) -> int:
    job = load_job(run)
    recipe = load_recipe(run / RECIPE, stored=True)
    settings = recipe.to_yaml()
    if settings != (run / RECIPE).read_text(encoding="utf-8"):
        write_recipe(run, settings)  # submitted by an earlier version: the ranks read it next, and refuse names of that
        print(f"bifrost: {run / RECIPE}: rewritten for this version", file=sys.stderr, flush=True)
    for name in (exit_record.OUTCOME, exit_record.OLD_OUTCOME):
        (run / name).unlink(missing_ok=True)
    step = exit_record.newest_step(run)
    # After a lost node or a preemption Slurm requeues the job itself, without a call of `after`.
    if _crash_looping(job, step):
        raise SlurmError(_crash_loop(step))
    got = int(os.environ.get("SLURM_JOB_NUM_NODES", job.nodes[1]))
    nodes = usable_nodes(recipe.global_batch, recipe.micro_batch, job.tasks_per_node, (min(job.nodes[0], got), got))
    exit_record.append(run, {"step": step, "nodes": nodes, "hosts": os.environ.get("SLURM_JOB_NODELIST")})
    return nodes


def _ends_at() -> float | None:
    known = os.environ.get("SLURM_JOB_END_TIME")  # Slurm 23.02 and later
    if known:
        return float(known)
    state = _state()
    return state.ends_at if state and state.state == "RUNNING" else None


def after(run: Path, code: int) -> tuple[str, int]:
    """Finish, requeue or stop a job whose ranks ended with `code`.

    Returns a line that describes the decision, and the job's exit code.
    """
    # The requeue below ends this job: ignore its SIGTERM, so that the excluded nodes are still set.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    job = load_job(run)
    code, reason, host, final = read_reason(run, code)
    if code == DONE:
        return _end(job, "done", "all steps are done"), DONE
    if final:
        return _stop(job, code, reason)
    if job.cancelled:
        return _end(job, "cancelled", "stopped by bifrost slurm cancel"), DONE
    state = _state()
    if state and state.state != "RUNNING" and state.reason != "TimeLimit":
        # Ended or requeued by the user or by Slurm.
        exit_record.append(run, {"code": code, "decision": "left", "reason": state.state})
        return f"the job is {state.state}: left to Slurm", code
    return _restart(job, code, reason, host, state)


def _restart(job: Job, code: int, reason: str, host: str | None, state: commands.JobState | None) -> tuple[str, int]:
    history = exit_record.attempts(job.path, job.submitted)
    hung = 1 + sum(attempt.get("code") == HUNG and attempt.get("host") == host for attempt in history)
    bad = {host: f"hung in {hung} attempts: {reason}"} if host and code == HUNG and hung >= MAX_HANGS_PER_NODE else {}
    left_out = _excluded_nodes(job, bad)
    # An attempt that found a new bad node counts as progress.
    known = {node for attempt in history for node in attempt.get("excluded", [])}
    found = left_out if (code == BAD_NODE or bad) and left_out and set(left_out) - known else []
    exit_record.append(job.path, {"code": code, "decision": "again", "reason": reason, "host": host, "excluded": found})
    step = exit_record.newest_step(job.path)
    if _crash_looping(job, step):
        return _stop(job, code, f"{_crash_loop(step)}; the last one: {reason}")
    if job.array:
        waiting = os.environ["SLURM_ARRAY_JOB_ID"]
        again = "the next element of the array continues"
    else:
        try:
            commands.requeue(_id())
            waiting, again = _id(), "requeued"
        except SlurmError as error:
            try:
                job.id = waiting = commands.submit(job.path / SCRIPT, after=_id())
            except SlurmError as refusal:
                return _stop(job, code, f"{reason}; Slurm could not restart it: {error}; {refusal}")
            job.save()
            state, again = None, f"continues as job {waiting} ({error})"
    if left_out is not None:
        again += _set_excluded(waiting, [*expand_hosts(job.exclude or ""), *left_out], state)
    return f"{reason}: {again}, from step {step}", code


def _excluded_nodes(job: Job, bad: dict[str, str]) -> list[str] | None:
    """Record `bad` and return all nodes that run and site exclude; None with a message if the files cannot be used,
    since the run can continue without them."""
    try:
        site = load_site(job.path)
        if bad:
            exclude(bad, job.path, site)
        return excluded(job.path, site)
    except (OSError, SlurmError) as error:
        print(f"bifrost: excluded nodes: {error}", file=sys.stderr, flush=True)
        return None


def _set_excluded(job: str, nodes: list[str], state: commands.JobState | None) -> str:
    """Set the excluded nodes of the pending `job` to `nodes`, unless `state` shows they are; return a note for the
    log line."""
    if state and set(expand_hosts(state.excluded)) == set(nodes):
        return ""
    try:
        commands.exclude_nodes(job, nodes)
    except SlurmError as error:
        return f", but not without {', '.join(nodes)} ({error})"
    return f" without {', '.join(nodes)}" if nodes else ""


def _stop(job: Job, code: int, reason: str) -> tuple[str, int]:
    exit_record.write_stopped(job.path, code, reason)
    return _end(job, "stopped", reason), code


def _end(job: Job, decision: str, reason: str) -> str:
    exit_record.append(job.path, {"decision": decision, "reason": reason})
    if job.array:
        commands.cancel(os.environ["SLURM_ARRAY_JOB_ID"], waiting_only=True)
    return f"{decision}: {reason}"


def _crash_looping(job: Job, step: int) -> bool:
    history = exit_record.attempts(job.path, job.submitted)
    return exit_record.restarts_without_progress(history, step) >= MAX_RESTARTS_WITHOUT_PROGRESS


def _crash_loop(step: int) -> str:
    return (
        f"{MAX_RESTARTS_WITHOUT_PROGRESS} attempts without a checkpoint after step {step}: not restarted; see"
        " slurm/job.log, fix the cause, then bifrost slurm resume"
    )


def _state() -> commands.JobState | None:
    """State of this job; None if Slurm does not answer."""
    try:
        return commands.job_state(_id())
    except SlurmError as error:
        print(f"bifrost: {error}", file=sys.stderr, flush=True)
        return None


def _id() -> str:
    return os.environ["SLURM_JOB_ID"]
