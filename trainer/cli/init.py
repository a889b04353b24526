"""`bifrost init`: a commented recipe to start from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ...data.atomic import write_atomic
from ...recipes import load_recipe, shipped_recipes
from ...slurm.named_paths import require_paths
from ..errors import RunError, writing

CHOICES = ", ".join(shipped_recipes())


def init(
    name: Annotated[str, typer.Argument(help="Name of the run: letters, digits, . _ and -.")],
    source: Annotated[
        str | None,
        typer.Option("--from", help=f"The recipe to start from: {CHOICES}, or a file.", show_default=False),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Your shards, braces and wildcards in quotes.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output file; default NAME.yaml.")] = None,
) -> None:
    """Write a recipe of your own: a shipped one with every setting explained."""
    if source is None:
        raise RunError(f"choose a recipe to start from, such as --from tiny-mllm; available: {CHOICES}")
    if name.lower().endswith((".yaml", ".yml")):
        raise RunError(f"{name}: NAME is the name of the run, without the ending of a file: give {Path(name).stem}")
    file = out or Path(f"{name}.yaml")
    from ...recipes.template import template

    text = template(source, name, data, str(file))
    recipe = load_recipe(source, [f"name={name}"])
    require_paths(Path(recipe.runs_dir) / name, recipe.previews, recipe.init_from)
    if os.path.lexists(file):
        raise RunError(f"{file}: already exists; choose another NAME or --out")
    with writing(file):
        write_atomic(file, text.encode())
    recipe = load_recipe(file)
    tiny = recipe.backbone.path.startswith("builtin:")
    print(f"{file}: stage {recipe.stage}, as {source}. Next:")
    if data is None:
        shards = ", ".join(recipe.data.named)
        own = f"{name}-shards"
        print(f"  bifrost data ingest IMAGES {own}    # then set data.shards to {own}/*.tar; now it is {shards}")
    print(f"  bifrost plan {file} --device h100     # memory, hours and cost")
    print(f"  bifrost train {file}{' --ranks 2' if tiny else ''}")
    if not tiny:
        print(f"  bifrost slurm submit {file} --nodes 1 --gpus-per-node 8")
