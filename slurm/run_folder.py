"""The message for a path that should be a run folder and is none."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path

MARKS = ("recipe.yaml", "slurm/recipe.yaml")
"""Files of which every run folder has one."""


def no_run(run: Path, lacking: str) -> str:
    """One line with what is wrong with the path `run`, naming the run next to it of the most similar name.

    lacking: what a run folder would have, such as "recipe.yaml"."""
    what = f"not a run folder, it has no {lacking}" if run.exists() else "no such run folder"
    others: list[str] = []
    with suppress(OSError):
        others = [path.name for path in run.parent.iterdir() if any((path / mark).is_file() for mark in MARKS)]
    near = difflib.get_close_matches(run.name, sorted(others), n=1)
    hint = f"did you mean {run.parent / near[0]}?" if near else "`bifrost runs FOLDER` lists the runs in a folder"
    return f"{run}: {what}; {hint}"
