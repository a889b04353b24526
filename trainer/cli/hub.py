"""`bifrost hub`: exported folders to and from a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Exported folders on a model hub: push, pull.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A model of the hub.")]


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A folder that bifrost export wrote.")],
    name: Name,
    public: Annotated[bool, typer.Option("--public", help="Make a new model public; default private.")] = False,
) -> None:
    """Send an exported folder to the hub as one commit; after an interruption, only what is missing there."""
    from ..checkpoint.published import push as send

    print(f"{name}: {send(folder, name, not public)}")


@app.command()
def pull(
    name: Name,
    out: Annotated[Path, typer.Argument(help="A new folder, or one in which the same was interrupted.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default main.")] = None,
) -> None:
    """Fetch an exported folder from the hub, and compare its files with their hashes."""
    from ..checkpoint.published import pull as fetch

    print(f"{fetch(name, out, revision)}: fetched and verified")
