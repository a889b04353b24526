"""Render the batch script of a job."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import jinja2

from .exclusions import excluded
from .job import LOG, RECIPE, Job
from .rank_env import LAUNCHER_VARIABLES
from .site import Site

TRAINING, EVALUATION = "job.sh.jinja", "eval.sh.jinja"


def render(job: Job, site: Site, template: str = TRAINING, log: str = LOG, **more: object) -> str:
    """The batch script of `job`. log: file of its output in the run folder. more: further variables of the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = _quote
    environment.filters["expandable"] = _expandable
    text = environment.get_template(template).render(
        job=job,
        site=site,
        options=_options(job, site, log),
        variables={**_threads(job, site), **site.variables()},
        # These steps need Slurm's commands, which an image may lack: they run with the submitting Python.
        python=sys.executable,
        step_options=_step_options(job, site),
        command=_command(site),
        recipe=RECIPE,
        leftovers=LAUNCHER_VARIABLES,
        **more,
    )
    return "\n".join(line for line in text.splitlines() if line.strip()) + "\n"


def _quote(value: object) -> str:
    text = shlex.quote(str(value))
    # Not needed by the shell, but shellcheck warns about a comma in a list.
    return f"'{text}'" if "," in text and "'" not in text else text


def _expandable(value: object) -> str:
    """In double quotes: the shell expands `$NAME` and nothing else."""
    return '"' + re.sub(r'(["`\\]|\$\()', lambda match: "\\" + match[0], str(value)) + '"'


def _options(job: Job, site: Site, log: str) -> list[str]:
    """Options of sbatch."""
    left_out = [*([job.exclude] if job.exclude else []), *excluded(job.path, site)]
    wanted = {
        "job-name": job.name,
        "nodes": job.node_range,
        "gpus-per-node": job.gpus_per_node or None,
        # For sbatch, one task per node: given more, Slurm allocates only the minimum of a node range.
        "cpus-per-task": job.tasks_per_node * job.cpus_per_task,
        "partition": job.partition or site.partition,
        "account": job.account or site.account,
        "time": job.time or site.time,
        "exclude": ",".join(left_out) or None,
        "array": job.array,
        "chdir": job.folder,
        "output": f"{job.run}/{log}",
        "signal": f"USR1@{job.grace_s}" if job.grace_s else None,
    }
    given = [f"--{name}={shlex.quote(str(value))}" for name, value in wanted.items() if value is not None]
    # Elements of an array are not requeued: the next element continues.
    again = "--requeue" if site.requeue and not job.array else "--no-requeue"
    return [*given, "--open-mode=append", again, *site.sbatch]


def _threads(job: Job, site: Site) -> dict[str, str]:
    # Without a GPU, each rank would use all cores.
    known = site.cpus_per_task or (None if job.gpus_per_node else 1)
    return {"OMP_NUM_THREADS": str(known)} if known else {}


def _step_options(job: Job, site: Site) -> list[str]:
    options = [f"--cpus-per-task={job.cpus_per_task}"]
    if site.container and site.container.kind == "pyxis":
        options.append(f"--container-image={site.container.image}")
        if site.container.mounts:
            options.append(f"--container-mounts={','.join(site.container.mounts)}")
    return options


def _command(site: Site) -> list[str]:
    """Command that runs Python in a rank."""
    container = site.container
    if container is None:
        return [site.python or sys.executable]
    if container.kind == "pyxis":
        return [container.python]
    binds = [word for mount in container.mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", *binds, container.image, container.python]
