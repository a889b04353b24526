"""The message for a path that should be a run folder and is none."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path

RECIPES = ("recipe.yaml", "slurm/recipe.yaml")
"""As resolved by an attempt; as submitted to Slurm, before the first attempt. Every run folder has one of them."""


def has_recipe(folder: Path) -> bool:
    """Whether an attempt or a submission has written its recipe into the folder."""
    return any((folder / name).is_file() for name in RECIPES)


def no_run(run: Path, lacking: str) -> str:
    """One line with what is wrong with the path `run`, naming the run of the most similar path.

    lacking: what a run folder would have, such as "recipe.yaml"."""
    what = f"not a run folder, it has no {lacking}" if run.exists() else "no such run folder"
    others: list[str] = []
    for folder in (run.parent, Path("runs")):  # a name alone is one in the usual folder
        with suppress(OSError):
            others += [str(path) for path in folder.iterdir() if has_recipe(path)]
    near = difflib.get_close_matches(str(run), sorted(others), n=1) or [
        other for other in sorted(others) if Path(other).name == run.name
    ]
    hint = f"did you mean {near[0]}?" if near else "`bifrost runs FOLDER` lists the runs in a folder"
    return f"{run}: {what}; {hint}"


def no_checkpoint(run: Path) -> str:
    """One line for a path without a folder of checkpoints, whether or not it is a run folder."""
    return f"{run}: has no checkpoint yet" if (run / "recipe.yaml").is_file() else no_run(run, "recipe.yaml")
