"""The message for a path that should be a run folder and is none."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path

MARKS = ("recipe.yaml", "slurm/recipe.yaml")
"""Files of which every run folder has one."""


def no_run(run: Path, lacking: str) -> str:
    """One line with what is wrong with the path `run`, naming the run of the most similar path.

    lacking: what a run folder would have, such as "recipe.yaml"."""
    what = f"not a run folder, it has no {lacking}" if run.exists() else "no such run folder"
    others: list[str] = []
    for folder in (run.parent, Path("runs")):  # a name alone is one in the usual folder
        with suppress(OSError):
            others += [str(path) for path in folder.iterdir() if any((path / mark).is_file() for mark in MARKS)]
    near = difflib.get_close_matches(str(run), sorted(others), n=1) or [
        other for other in sorted(others) if Path(other).name == run.name
    ]
    hint = f"did you mean {near[0]}?" if near else "`bifrost runs FOLDER` lists the runs in a folder"
    return f"{run}: {what}; {hint}"
