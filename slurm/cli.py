"""The `bifrost slurm` commands. SlurmErrors pass through: the main command turns them into one line."""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

slurm_app = typer.Typer(no_args_is_help=True)


@slurm_app.callback()
def slurm() -> None:
    """Slurm: jobs of a run, and a cluster to try them on."""


class Action(str, Enum):
    up = "up"
    down = "down"


@slurm_app.command()
def devcluster(
    action: Annotated[Action, typer.Argument(help="Start a cluster, or end it with its jobs.")],
    nodes: Annotated[int, typer.Option(help="Nodes: node1, node2, …", min=1)] = 2,
    folder: Annotated[Path | None, typer.Option(help="Where it lives; one cluster a folder.")] = None,
) -> None:
    """A real Slurm cluster on this machine, to try things on; up prints the line that turns Slurm's commands to it."""
    from . import devcluster as module

    folder = folder or module.default_folder()
    if action == Action.up:
        print(f"export SLURM_CONF={module.up(folder, nodes)}")
    else:
        print(f"{folder}: {module.down(folder)} processes ended")


@slurm_app.command()
def preflight(
    run: Annotated[Path | None, typer.Argument(help="A run's folder: its space, recipe and shards count too.")] = None,
) -> None:
    """Check the nodes of this job step, or this machine alone; exit code 2 for a fault of all, 77 for bad nodes."""
    from . import preflight as module

    code = module.preflight(run, module.find_place())
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that hang in a dead file system or network would keep the process alive.
    os._exit(code)
