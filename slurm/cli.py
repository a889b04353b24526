"""The `bifrost slurm` commands. They let SlurmError propagate; the main command prints it as one line."""

from __future__ import annotations

import os
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..recipes import load_recipe
from .errors import SlurmError

if TYPE_CHECKING:
    from .job import Job
    from .site import Site

Run = Annotated[Path, typer.Argument(help="Run folder, such as runs/mllm-7b.", show_default=False)]

slurm_app = typer.Typer(
    no_args_is_help=True, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@slurm_app.callback()
def slurm() -> None:
    """Slurm: submit and manage the jobs of a run; start a local test cluster."""


class Action(str, Enum):
    up = "up"
    down = "down"


@slurm_app.command()
def devcluster(
    action: Annotated[Action, typer.Argument(help="Start a cluster, or stop it and its jobs.")],
    nodes: Annotated[int, typer.Option(help="Nodes: node1, node2, …", min=1)] = 2,
    folder: Annotated[Path | None, typer.Option(help="Folder of the cluster; one cluster per folder.")] = None,
) -> None:
    """A real Slurm cluster on this machine, for testing; up prints the line that points Slurm's commands to it."""
    from . import devcluster as module

    folder = folder or module.default_folder()
    if action == Action.up:
        print(f"export SLURM_CONF={module.up(folder, nodes)}")
    else:
        print(f"{folder}: {module.down(folder)} processes ended")


@slurm_app.command()
def preflight(
    run: Annotated[Path | None, typer.Argument(help="Run folder; also checks its space, recipe and shards.")] = None,
) -> None:
    """Check the nodes of this job step, or this machine; exit code 2 for a fault on all nodes, 77 for bad nodes."""
    from . import preflight as module
    from .run_folder import no_run
    from .site import load_site

    me = module.find_rank_info()
    if run is not None and me.size == 1 and not run.is_dir():  # of several nodes, the one that lacks it is reported
        raise SlurmError(no_run(run, "recipe.yaml"))
    site = load_site(run)
    scratch = [folder for folder in [os.environ.get("BIFROST_SCRATCH")] if folder]
    limits = module.read_limits(site.preflight_limits)
    code = module.preflight(run, me, site, limits, scratch, site.preflight_command)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads stuck in an unresponsive file system or network would keep the process alive.
    os._exit(code)


@slurm_app.command("submit", help="Submit a run; it is requeued until its last step or until it cannot continue.")
@slurm_app.command("render", help="Print the batch script that submit would pass to Slurm.")
def submit(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value settings, such as optimizer.lr=3e-4.")
    ] = None,
    nodes: Annotated[str, typer.Option(help="Number of nodes, or minimum and maximum, such as 2-8.")] = "1",
    gpus_per_node: Annotated[int, typer.Option(help="GPUs per node, one rank each; 0 on a CPU cluster.", min=0)] = 8,
    tasks_per_node: Annotated[int | None, typer.Option(help="Ranks per node on a CPU cluster.", min=1)] = None,
    partition: Annotated[str | None, typer.Option(help="Partition; default: the site file's.")] = None,
    account: Annotated[str | None, typer.Option(help="Account; default: the site file's.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit per attempt; default: the site file's.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes to exclude, in Slurm's notation.")] = None,
    array: Annotated[str | None, typer.Option(help="Job array, such as 1-10%1, instead of requeueing.")] = None,
) -> None:
    from . import jobs
    from .job import parse_nodes
    from .named_paths import require_paths
    from .script import render
    from .site import load_site

    settings, site = load_recipe(recipe, overrides or []), load_site()
    request = jobs.Request(parse_nodes(nodes), gpus_per_node, tasks_per_node, partition, account, time, exclude, array)
    job = jobs.describe(settings, site, request)
    if context.info_name == "render":
        print(render(job, site), end="")
    else:
        require_paths(Path(job.run), settings.previews, settings.init_from)
        _warn_of_missing(settings.data.named, settings.validation.shards)
        _submit(job, settings.to_yaml(), site)


@slurm_app.command("submit-eval")
def submit_eval(
    run: Run,
    options: Annotated[list[str], typer.Argument(help="Options of `bifrost eval`, after --.", show_default=False)],
    every: Annotated[int, typer.Option(help="Score the checkpoints of every N-th step, and the last.", min=1)] = 1,
    minutes: Annotated[int, typer.Option(help="Between jobs that look for new checkpoints.", min=1)] = 20,
    gpus: Annotated[int, typer.Option(help="GPUs of a job; 0 on a CPU cluster.", min=0)] = 1,
    partition: Annotated[str | None, typer.Option(help="Partition; default: the site file's.")] = None,
    account: Annotated[str | None, typer.Option(help="Account; default: the site file's.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of a job; default: the site file's.")] = None,
) -> None:
    """Score the checkpoints of a run as they are saved: a job, which others follow until the run ends."""
    from . import eval_job
    from .job import Job
    from .site import load_site

    site = load_site()
    job = Job(
        name=f"eval-{run.resolve().name}",
        run=str(run.resolve()),
        folder=str(Path.cwd()),
        nodes=(1, 1),
        gpus_per_node=gpus,
        tasks_per_node=1,
        cpus_per_task=(site.cpus_per_task or 2) * max(gpus, 1),
        partition=partition,
        account=account,
        time=time,
        grace_s=0,
    )
    print(eval_job.submit(job, eval_job.EvalJob(every=every, minutes=minutes), options, site), flush=True)
    print(f"log:     {run / eval_job.LOG}", f"results: {run / eval_job.RESULTS}", sep="\n", file=sys.stderr)


@slurm_app.command()
def resume(run: Run) -> None:
    """Submit a run again with the same options, after a cancel or after fixing what stopped it."""
    from . import jobs
    from .job import RECIPE, load_job
    from .named_paths import require_paths
    from .site import load_site

    old, site = load_job(run), load_site()
    settings = load_recipe(run / RECIPE, stored=True)
    os.chdir(old.folder)
    asked = old.model_dump(include={"nodes", "gpus_per_node", "partition", "account", "time", "exclude", "array"})
    tasks = None if old.gpus_per_node else old.tasks_per_node
    request = jobs.Request(tasks_per_node=tasks, **asked)
    job = jobs.describe(settings, site, request)
    require_paths(Path(job.run), settings.previews, settings.init_from)
    _warn_of_missing(settings.data.named, settings.validation.shards)
    _submit(job, settings.to_yaml(), site)


def _warn_of_missing(*specs: str | list[str] | None) -> None:
    """Print a warning for local shards that this machine cannot read: they may be on the nodes' own disks."""
    from ..data import DataError
    from .named_paths import local_shards

    try:
        local_shards(*specs)
    except DataError as error:
        print(f"warning: {error}; submitted, since the nodes may have it: preflight checks it there", file=sys.stderr)


def _submit(job: Job, settings: str, site: Site) -> None:
    """Submit and print the job id to stdout for scripts, and the next commands to stderr."""
    from . import jobs

    print(jobs.submit(job, settings, site), flush=True)
    run = shlex.quote(os.path.relpath(job.run) if Path(job.run).is_relative_to(Path.cwd()) else job.run)
    print(
        f"log:    bifrost slurm logs {run} --follow", f"status: bifrost slurm status {run}", sep="\n", file=sys.stderr
    )


@slurm_app.command()
def status(run: Run) -> None:
    """Show the run's job, its attempts and why they ended, and the current step."""
    from . import jobs

    table = jobs.status(run)
    width = max(len(name) for name, _ in table)
    for name, value in table:
        print(f"{name:<{width}}  {value}")


@slurm_app.command()
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option(help="Number of last lines to print first.", min=0)] = 50,
) -> None:
    """Print the end of the job log: output of the batch script and rank 0, over all attempts."""
    from . import jobs

    raise typer.Exit(jobs.logs(run, follow, lines))


@slurm_app.command()
def cancel(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="Stop without saving first.")] = False,
) -> None:
    """Stop the run's job: it saves, ends and is not requeued."""
    from . import jobs

    print(jobs.cancel(run, now))


@slurm_app.command(hidden=True)
def before(run: Run) -> None:
    """First step of the batch script: record the attempt; print the number of nodes to use, a free port on this host
    (the first node) and the Unix time of the job's end."""
    from .rank_env import free_port
    from .requeue import before

    nodes, ends_at = before(run)
    print(nodes, free_port(int(os.environ.get("SLURM_JOB_ID", "0"))), *([int(ends_at)] if ends_at else []))


@slurm_app.command("next-eval", hidden=True)
def next_eval(run: Run) -> None:
    """Step of the batch script that scores checkpoints: print the next one, nothing if there is none."""
    from .eval_job import next_checkpoint

    print(next_checkpoint(run) or "")


@slurm_app.command(hidden=True)
def after(run: Run, code: Annotated[int, typer.Option(help="Exit code of the ranks.")]) -> None:
    """Last step of the batch script: finish, requeue or stop the run; print the job's exit code."""
    from .requeue import after

    line, code = after(run, code)
    print(f"bifrost: {line}", file=sys.stderr, flush=True)
    print(code)
