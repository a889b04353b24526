"""Checks of the paths that a recipe names, before anything is built: by init, plan, submit, preflight and training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.local import stat_of
from ..data.retry import call
from ..recipes import RecipeError
from .exit_record import newest_step

if TYPE_CHECKING:
    from ..recipes.schema import Previews

SAMPLE = 64
"""Shards whose sizes are read, evenly spaced: a stat of each of 100,000 would load the file system."""


def require_paths(run: Path, previews: Previews, init_from: str | None) -> None:
    """RecipeError for a missing path that the run in folder `run` reads only after its model is built; the message
    names the setting. Storage errors are retried, then DataLost. Shards and models are checked by what opens them."""
    paths = {"previews.controlnet": previews.controlnet if previews.every else None}
    if not newest_step(run):  # read only at the first start
        paths["init_from"] = init_from
    for key, path in paths.items():
        if path and stat_of(path) is None:
            raise RecipeError(f"{key}={path}: no such file or folder")


def local_shards(*specs: str | list[str] | None) -> tuple[list[str], list[int]]:
    """The local shards that a recipe names, and the sizes in bytes of a sample of them; those behind a URL are left
    out. DataError if a path or pattern has none, or one of the sample is missing; DataLost after retries."""
    from braceexpand import braceexpand

    from ..data.files import is_local
    from ..data.shard_list import expand

    shards: list[str] = []
    for spec in specs:
        patterns = [each for one in ([spec] if isinstance(spec, str) else spec or []) for each in braceexpand(one)]
        local = [pattern for pattern in patterns if is_local(pattern)]
        shards += expand(local, mixed=False) if local else []
    sample = shards[:: max(1, len(shards) // SAMPLE)]
    return shards, [call(lambda each=each: os.stat(each), each).st_size for each in sample]
