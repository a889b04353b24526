"""Arguments and options shared by several commands."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value settings, such as optimizer.lr=3e-4.")]
RanksOption = Annotated[int | None, typer.Option(help="Processes on this machine; default one per GPU.", min=1)]
