"""Arguments and options shared by several commands."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import RunError

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value settings, such as optimizer.lr=3e-4.")]
RanksOption = Annotated[int | None, typer.Option(help="Processes on this machine; default one per GPU.", min=1)]


def counts(option: str, text: str) -> list[int]:
    """The numbers of a list such as 8,64; RunError unless all are whole numbers from 1."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise RunError(f"{option} {text}: give whole numbers from 1, such as 8,64")
    return found
