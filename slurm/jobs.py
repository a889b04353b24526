"""Submit a run; query, log and cancel its job from the run folder."""

from __future__ import annotations

import json
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipes import Recipe
from . import commands, eval_job, exit_record
from .errors import SlurmError
from .exclusions import read_exclusions
from .io import write_json
from .job import LOG, SCRIPT, Job, load_job, seconds, usable_nodes, write_recipe
from .pending import explained
from .rank_env import UNBIND
from .script import render
from .site import COPY, Site

BINDING = re.compile("--(gpus-per-task|gpu-bind|tres-per-task=.*gpu|ntasks-per-gpu)")
"""Options of sbatch that hide a node's GPUs from its tasks."""


@dataclass(frozen=True)
class Request:
    """What a user asks Slurm for; None stands for the site file's value."""

    nodes: tuple[int, int]
    """Minimum and maximum number of nodes."""
    gpus_per_node: int
    tasks_per_node: int | None
    """Ranks per node; None with GPUs, which have one each."""
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    exclude: str | None = None
    array: str | None = None


def describe(recipe: Recipe, site: Site, request: Request) -> Job:
    """A validated job for `recipe`; nothing is written. Raises SlurmError for invalid combinations."""
    gpus_per_node, array = request.gpus_per_node, request.array
    if gpus_per_node and request.tasks_per_node not in (None, gpus_per_node):
        raise SlurmError(
            f"--tasks-per-node {request.tasks_per_node}: with GPUs there is one task per GPU, leave it out"
        )
    tasks = gpus_per_node or request.tasks_per_node
    if not tasks:
        raise SlurmError("--gpus-per-node 0 needs --tasks-per-node: the number of ranks per node")
    if array and not array.endswith("%1"):
        raise SlurmError(f"--array {array}: elements must run one at a time, end it with %1, such as 1-10%1")
    if bound := next((option for option in site.sbatch if BINDING.match(option)), None):
        raise SlurmError(f"site file: sbatch: {bound}: {UNBIND}")
    usable_nodes(recipe.global_batch, recipe.micro_batch, tasks, request.nodes)
    run = (Path(recipe.runs_dir) / recipe.name).resolve()
    job = Job(
        name=recipe.name,
        run=str(run),
        folder=str(Path.cwd()),
        nodes=request.nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks,
        # Per GPU: the rank's main thread, one for communication, and the loader's workers.
        cpus_per_task=site.cpus_per_task or (recipe.data.workers + 2 if gpus_per_node else 1),
        partition=request.partition,
        account=request.account,
        time=request.time,
        exclude=request.exclude,
        array=array,
        grace_s=exit_record.grace(run),
    )
    limit = job.time or site.time
    if limit and limit.lower() not in ("unlimited", "infinite") and seconds(limit) <= job.grace_s:
        raise SlurmError(f"time limit {limit}: {job.grace_s} s are reserved for a last step and save; request more")
    return job


def submit(job: Job, settings: str, site: Site) -> str:
    """Write script and recipe into the run folder, submit the script and return the job id.

    settings: the recipe, as YAML. Raises SlurmError if a job of this run is pending or running, or if Slurm refuses.
    """
    refuse_second(job.path)
    script = render(job, site)
    commands.check_request(script, job.partition or site.partition, job.nodes[0])
    (job.path / "slurm").mkdir(parents=True, exist_ok=True)
    write_recipe(job.path, settings)
    write_json(job.path / COPY, site.model_dump(mode="json"))
    (job.path / SCRIPT).write_text(script, encoding="utf-8")
    (job.path / exit_record.STOPPED).unlink(missing_ok=True)
    job.submitted, job.cancelled = time.time(), False
    job.save()  # the job may start before its id is known
    job.id = commands.submit(job.path / SCRIPT)
    job.save()
    return job.id


def refuse_second(run: Path) -> None:
    """Raise SlurmError if a job of this run is alive."""
    try:
        job = load_job(run)
    except SlurmError:
        return
    state = commands.job_state(job.id) if job.id else None
    if state and state.alive:
        raise SlurmError(f"{run}: job {job.id} of this run is {state.state}; end it first: bifrost slurm cancel {run}")


def cancel(run: Path, now: bool) -> str:
    """Stop a run's job, which saves first if it is running and not `now`; return a line that describes what happens."""
    job = load_job(run)
    state = commands.job_state(job.id) if job.id else None
    if job.id is None or state is None or not state.alive:
        raise SlurmError(f"{run}: job {job.id} is not pending or running")
    job.cancelled = True
    job.save()
    if state.state == "RUNNING" and not now:
        commands.signal_ranks(job.id, "USR1")
        return f"job {job.id}: its ranks save and stop; --now ends it at once"
    commands.cancel(job.id)
    return f"job {job.id}: cancelled"


def status(run: Path) -> list[tuple[str, str]]:
    """State of a run and its job, as (name, value)."""
    job = load_job(run)
    state = commands.job_state(job.id) if job.id else None
    shown = state.state if state else "no longer known to Slurm"
    if state and state.reason != "None":
        shown += f" ({explained(state.reason)})"
    if state and state.state == "RUNNING":
        shown += f", {state.elapsed} on {state.nodes}"
    lines = [("run", str(run)), ("job", f"{job.id} {shown}")]
    for each in exit_record.attempts(run)[-5:]:
        when = time.strftime("%m-%d %H:%M", time.localtime(each["time"]))
        ended = f"; {each['decision']}: {each['reason']}" if "decision" in each else ""
        begun = f"{when}, {each.get('nodes')} nodes from step {each.get('step')}{ended}"
        lines.append((f"attempt {each['attempt']}", begun))
    if last := exit_record.last_metrics(run):
        steps = f"{last['step']}, newest checkpoint {exit_record.newest_step(run)}, loss {_rounded(last.get('loss'))}"
        lines.append(("step", f"{steps}, {last.get('samples_per_s', 0):.1f} samples/s"))
    lines += [("goodput", text) for text in _goodput(run)]
    lines += [("evaluation", text) for text in eval_job.status(run)]
    for node, entry in read_exclusions(run / "excluded.json").items():
        lines.append(("excluded", f"{node}: {entry.get('reason')}"))
    stopped = run / exit_record.STOPPED
    if stopped.exists():
        lines.append(("stopped", json.loads(stopped.read_text())["reason"]))
    return lines


def logs(run: Path, follow: bool, lines: int) -> int:
    """Print the end of the job log, and new lines if `follow`; return an exit code."""
    path = run / LOG
    if not path.exists():
        raise SlurmError(f"{path} does not exist yet: see bifrost slurm status {run}")
    try:
        return subprocess.run(
            ["tail", f"--lines={lines}", *(["--follow=name"] if follow else []), str(path)]
        ).returncode
    except KeyboardInterrupt:
        return 0


def _rounded(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "not finite"


def _goodput(run: Path) -> list[str]:
    """Goodput as the trainer last wrote it."""
    try:
        found = json.loads((run / "goodput.json").read_text())
        shares = ", ".join(f"{kind} {spent / found['wall_s']:.1%}" for kind, spent in found["seconds"].items())
        return [f"{found['ettr']:.1%} of {found['wall_s']:.0f} s since the first attempt ({shares})"]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return []  # not written yet, or by another version: the job's state is what matters here
