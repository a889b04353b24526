"""A few steps of a recipe whose run is not kept, for measurements."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...recipes import Recipe
from ..optim.train_state import TrainState
from ..training.train import train

WARMUP = 2
"""Steps before the measured ones: the first builds, measures and allocates."""


@dataclass(frozen=True)
class ShortRun:
    """The first steps of a run, without saves and mirror; its folder is not kept."""

    recipe: Recipe
    """Its steps are never reached, because a last step saves."""

    @classmethod
    def of(cls, recipe: Recipe, steps: int, folder: Path, **other: Any) -> ShortRun:
        """WARMUP + `steps` steps of a recipe, in `folder`; other: further settings."""
        last = WARMUP + steps + 1
        update: dict[str, Any] = {"steps": last, "runs_dir": str(folder), "init_from": None, **other}
        update["checkpoint"] = recipe.checkpoint.model_copy(update={"every": last})
        update["tracking"] = recipe.tracking.model_copy(update={"enabled": False})
        return cls(recipe.model_copy(update=update))

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def folder(self) -> Path:
        return Path(self.recipe.runs_dir)

    @property
    def steps(self) -> int:
        """Measured steps."""
        return self.recipe.steps - 1 - WARMUP

    def measure(self, begin: Callable[[], None], end: Callable[[], None]) -> int:
        """Train on this rank and call `begin` after the warm-up, `end` after the last step. Returns the exit code."""

        def after_step(progress: TrainState) -> None:
            if progress.step == WARMUP:
                begin()
            elif progress.step == WARMUP + self.steps:
                end()
                raise _Measured

        if os.environ.get("RANK", "0") == "0":  # leftovers of an interrupted measurement
            shutil.rmtree(self.folder, ignore_errors=True)
        try:
            return train(self.recipe, after_step)
        except _Measured:
            return 0


class _Measured(Exception):
    """Ends the run before anything is saved."""
