"""Check of the paths that a recipe names, before anything is built: by init, plan, submit, preflight and training."""

from __future__ import annotations

from pathlib import Path

from ..data.local import stat_of
from ..recipes import RecipeError
from ..recipes.schema import Previews
from .exit_record import newest_step


def require_paths(run: Path, previews: Previews, init_from: str | None) -> None:
    """RecipeError for a missing path that the run in folder `run` reads only after its model is built; the message
    names the setting. Storage errors are retried, then DataLost. Shards and models are checked by what opens them."""
    paths = {"previews.controlnet": previews.controlnet if previews.every else None}
    if not newest_step(run):  # read only at the first start
        paths["init_from"] = init_from
    for key, path in paths.items():
        if path and stat_of(path) is None:
            raise RecipeError(f"{key}={path}: no such file or folder")
