"""`bifrost track`: bring the tracking server up to date with a run's metrics file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Mirror runs to MLflow.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `sync` a sub-command although it is the only one."""


@app.command()
def sync(run: Annotated[Path, typer.Argument(help="Run folder, such as runs/mllm-7b.", show_default=False)]) -> None:
    """Send every point and file of RUN that its tracking server lacks."""
    from ..monitors.tracking import sync as send

    points = send(run)
    typer.echo(f"{run}: {points} points sent, the server is up to date")
