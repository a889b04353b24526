"""`bifrost manifest`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from ...recipes import load_recipe


class Kind(str, Enum):
    jobset = "jobset"
    pytorchjob = "pytorchjob"
    skypilot = "skypilot"


def manifest(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value settings, such as optimizer.lr=3e-4.")
    ] = None,
    kind: Annotated[
        Kind,
        typer.Option(help="Kubernetes' JobSet, the PyTorchJob of Kubeflow's training operator, or SkyPilot's task."),
    ] = Kind.jobset,
    nodes: Annotated[int, typer.Option(help="Number of nodes, one pod each.", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs per node, one rank each; 0 on a CPU cluster.", min=0)] = 8,
    tasks_per_node: Annotated[int | None, typer.Option(help="Ranks per node on a CPU cluster.", min=1)] = None,
) -> None:
    """Print the manifest of a run for Kubernetes or SkyPilot, with the site file's settings."""
    from .. import jobs
    from ..site import load_site
    from .kubernetes import jobset, pytorchjob
    from .node import Run
    from .skypilot import skypilot

    settings, site = load_recipe(recipe, overrides or []), load_site()
    job = jobs.describe(settings, site, jobs.Request((nodes, nodes), gpus_per_node, tasks_per_node))
    run = Run(job, site, settings.to_yaml())
    renderers = {Kind.jobset: jobset, Kind.pytorchjob: pytorchjob, Kind.skypilot: skypilot}
    print(renderers[kind](run), end="")
