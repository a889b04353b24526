"""Check of the paths that a recipe names, before anything is built; plan, init, preflight and training share it."""

from __future__ import annotations

from pathlib import Path

from ..data.local import stat_of
from ..recipes import Recipe, RecipeError
from .exit_record import newest_step


def require_paths(recipe: Recipe) -> None:
    """RecipeError for a missing path that a run reads only after its model is built; the message names the setting.
    Storage errors are retried, then DataLost. Shards and models are checked by what opens them."""
    paths = {"previews.controlnet": recipe.previews.controlnet if recipe.previews.every else None}
    if not newest_step(Path(recipe.runs_dir) / recipe.name):  # read only at the first start
        paths["init_from"] = recipe.init_from
    for key, path in paths.items():
        if path and stat_of(path) is None:
            raise RecipeError(f"{key}={path}: no such file or folder")
