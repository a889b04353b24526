"""Jobs that score the checkpoints of a run as they are saved: a chain, of which each submits the next.

The next job is submitted before anything is scored: a job that ends early, for whatever reason, does not end the chain.
It depends on the end of its predecessor, so that never two score the same checkpoint. A checkpoint is scored from hard
links to its files: the run may prune it meanwhile.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from ..recipes import Recipe, load_recipe
from . import commands, exit_record
from .errors import SlurmError
from .held import hold
from .io import read_json, write_json
from .job import Job, load_job
from .run_folder import RECIPES, no_run
from .script import EVALUATION, render
from .site import Site

FOLDER = "slurm/eval"
FILE, SCRIPT, LOG = f"{FOLDER}/job.json", f"{FOLDER}/job.sh", f"{FOLDER}/job.log"
RESULTS = "evaluations"
"""Folder in the run with the results, a folder per checkpoint."""
HELD = f"{RESULTS}/held"
"""Links to the files of the checkpoint that is being scored."""
DONE = "metrics.json"
"""In the results of a checkpoint that was scored."""
MAX_TRIES = 3
"""Number of attempts at a checkpoint before it is left out."""
WEIGHTS = {"patch-latents": "--mllm", "controlnet": "--controlnet"}
"""Stage -> option of `bifrost eval` for a checkpoint of it."""


class EvalJob(BaseModel):
    """The chain of jobs that scores the checkpoints of a run."""

    every: int
    """Interval, in steps, of the checkpoints that are scored; the run's last one is too."""
    minutes: int
    """From the start of a job to the earliest start of the next."""
    id: str | None = None
    """The job that may score now."""
    next: str | None = None
    """The job that continues after it."""
    failures: dict[int, int] = Field(default_factory=dict)
    """Step -> how often it could not be scored."""


def submit(job: Job, plan: EvalJob, words: Sequence[str], site: Site) -> str:
    """Submit the first job of the chain and return its id.

    job: resources; words: options of `bifrost eval`. Raises SlurmError if a job already scores this run, the options
    cannot be used, or Slurm refuses.
    """
    run = job.path
    weights = WEIGHTS[_recipe(run).stage]
    _check_options(words, weights)
    if (old := _load(run)) and (alive := [each for each in (old.id, old.next) if each and _alive(each)]):
        raise SlurmError(f"{run}: job {alive[0]} scores this run; end it first: scancel {' '.join(alive)}")
    script = render(job, site, EVALUATION, LOG, weights=weights, words=words, results=RESULTS)
    commands.check_request(script, job.partition or site.partition, 1)
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    (run / SCRIPT).write_text(script, encoding="utf-8")
    # Held until its id is known: a job that does not find its own id ends.
    plan.id = commands.submit(run / SCRIPT, held=True)
    write_json(run / FILE, plan.model_dump(mode="json"))
    commands.release(plan.id)
    return plan.id


def next_checkpoint(run: Path) -> Path | None:
    """The links to the next checkpoint that this job is to score; None if there is none, and the job ends.

    The first call of a job submits the next one, which the last call cancels if the run has ended. Raises SlurmError if
    another chain of jobs scores this run.
    """
    plan = _load(run)
    me = os.environ.get("SLURM_JOB_ID", "")
    if plan is None or me not in (plan.id, plan.next):
        raise SlurmError(f"{run}: job {me} is not the one that scores this run, see {FILE}; it ends")
    if plan.id != me or plan.next is None:
        plan.id, plan.next = me, commands.submit(run / SCRIPT, after=me, minutes=plan.minutes)
    over = _is_over(run)  # before checkpoints are listed: of a run that continues, the next job sees later ones
    _release(run, plan)
    write_json(run / FILE, plan.model_dump(mode="json"))
    for step in _unscored(run, plan):
        held = run / HELD / _name(step)
        if hold(run / "checkpoints" / _name(step), held):
            return held
    if over and plan.next:
        commands.cancel(plan.next)
    return None


def status(run: Path) -> list[str]:
    """One line about the jobs that score the run's checkpoints; none if there were none."""
    plan = _load(run)
    if plan is None:
        return []
    alive = [f"job {each} {state}" for each in (plan.id, plan.next) if each and (state := _alive(each))]
    steps = sorted(int(done.parent.name.removeprefix("step-")) for done in (run / RESULTS).glob(f"step-*/{DONE}"))
    parts = [*(alive or ["no job"]), f"{len(steps)} scored{f', newest step {steps[-1]}' if steps else ''}"]
    parts += [f"step {step} failed {count} times, see {LOG}" for step, count in sorted(plan.failures.items())]
    return ["; ".join(parts)]


def _unscored(run: Path, plan: EvalJob) -> list[int]:
    """Steps of checkpoints to score, oldest first: they are the first to be pruned."""
    last = _recipe(run).steps
    return [
        step
        for step in exit_record.steps_saved(run)
        if (step % plan.every == 0 or step == last)
        and not (run / RESULTS / _name(step) / DONE).exists()
        and plan.failures.get(step, 0) < MAX_TRIES
    ]


def _release(run: Path, plan: EvalJob) -> None:
    """Remove the links of what was scored before, by this job or by one that ended early, and count failures."""
    for held in (run / HELD).glob("step-*"):
        step = int(held.name.removeprefix("step-"))
        if not (run / RESULTS / held.name / DONE).exists():
            plan.failures[step] = plan.failures.get(step, 0) + 1
        shutil.rmtree(held)


def _is_over(run: Path) -> bool:
    """Whether the run saves no more checkpoints: it has its last one, or its job has ended. One without a job may
    continue at any time."""
    if exit_record.newest_step(run) >= _recipe(run).steps or (run / exit_record.STOPPED).exists():
        return True
    try:
        job = load_job(run)
    except SlurmError:
        return False
    return job.id is not None and _alive(job.id) is None


def _check_options(words: Sequence[str], own: str) -> None:
    """Raise SlurmError for options of `bifrost eval` that this job sets itself, or without those that it needs."""
    given = {word.partition("=")[0] for word in words}
    if taken := sorted(given & {own, "--out"}):
        raise SlurmError(f"{taken[0]}: is set for every checkpoint; leave it out")
    needed = [{"--data"}, *([{"--controlnet", "--scenes"}] if own == "--mllm" else [])]
    if not all(given & options for options in needed):
        words = " and ".join(" or ".join(sorted(options)) for options in needed)
        raise SlurmError(f"after -- give the other options of `bifrost eval`: {words}")


def _load(run: Path) -> EvalJob | None:
    try:
        found = read_json(run / FILE)
        return None if found is None else EvalJob.model_validate(found)
    except (ValidationError, ValueError) as error:
        raise SlurmError(f"{run / FILE}: not written by bifrost slurm submit-eval; remove it") from error


def _recipe(run: Path) -> Recipe:
    path = next((run / name for name in RECIPES if (run / name).is_file()), None)
    if path is None:
        raise SlurmError(no_run(run, "recipe.yaml"))
    return load_recipe(path, stored=True)


def _alive(job: str) -> str | None:
    """State of a job that is pending or running; None for others."""
    found = commands.job_state(job)
    return found.state if found and found.alive else None


def _name(step: int) -> str:
    """Folder of a checkpoint, and of its results."""
    return f"step-{step:08d}"
