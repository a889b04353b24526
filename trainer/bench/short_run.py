"""A few steps of a recipe whose run is not kept, for measurements."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...recipes import Recipe
from ..optim.train_state import TrainState
from ..training.train import train

WARMUP = 2
"""Steps before the measured ones: the first builds, measures and allocates."""


def short_recipe(recipe: Recipe, steps: int, folder: Path, **other: Any) -> Recipe:
    """The recipe of a run in `folder` of WARMUP + `steps` steps, without saves and mirror; other: further settings."""
    last = WARMUP + steps + 1  # never reached: a last step saves
    update: dict[str, Any] = {"steps": last, "runs_dir": str(folder), "init_from": None, **other}
    update["checkpoint"] = recipe.checkpoint.model_copy(update={"every": last})
    update["tracking"] = recipe.tracking.model_copy(update={"enabled": False})
    return recipe.model_copy(update=update)


def measure_steps(recipe: Recipe, begin: Callable[[], None], end: Callable[[], None]) -> int:
    """Train a `short_recipe` on this rank and call `begin` after the warm-up, `end` after the last step. Returns the
    exit code."""

    def after_step(progress: TrainState) -> None:
        if progress.step == WARMUP:
            begin()
        elif progress.step == recipe.steps - 1:
            end()
            raise _Measured

    if os.environ.get("RANK", "0") == "0":  # leftovers of an interrupted measurement
        shutil.rmtree(recipe.runs_dir, ignore_errors=True)
    try:
        return train(recipe, after_step)
    except _Measured:
        return 0


class _Measured(Exception):
    """Ends the run before anything is saved."""
