"""`bifrost track`: bring the trackers up to date with a run's metrics file."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Mirror runs to their trackers.", no_args_is_help=True)


class To(str, Enum):
    mlflow = "mlflow"
    tensorboard = "tensorboard"
    wandb = "wandb"


@app.callback()
def _group() -> None:
    """Keeps `sync` a sub-command although it is the only one."""


@app.command()
def sync(
    run: Annotated[Path, typer.Argument(help="Run folder, such as runs/mllm-7b.", show_default=False)],
    to: Annotated[
        list[To] | None,
        typer.Option(help="Tracker, several times for several; default those of the recipe."),
    ] = None,
) -> None:
    """Send every point and file of RUN that its trackers lack."""
    from ..monitors.trackers import TITLES
    from ..monitors.tracking import sync as send

    for name, points in send(run, [each.value for each in to or []]).items():
        typer.echo(f"{run}: {points} points sent, {TITLES[name]} is up to date")
