"""Recipe and trained weights of a run folder, of one of its checkpoints, or of an export."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from ...recipes import Recipe, explain, load_recipe, with_new_names
from ...slurm.exit_record import newest_step
from ...slurm.run_folder import no_run
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.reader import CheckpointReader
from ..checkpoint.state import CheckpointWeights
from ..checkpoint.store import Store
from ..distributed.process_group import Gather, single_process
from ..errors import RunError

RECIPE = "recipe.yaml"
SLOTS = ("ema", "master")
"""Weights to load from a checkpoint: the EMA if present, else the master weights."""


def stored_recipe(path: Path, stage: str) -> Recipe:
    """The recipe in a run folder, in a checkpoint's `state.json`, or in an export's `config.json`. RunError unless it
    is of `stage`."""
    exported = path / "config.json"
    if (path / RECIPE).is_file():
        recipe = load_recipe(path / RECIPE, stored=True)
    elif is_checkpoint(path):
        recipe = Recipe.model_validate(CheckpointReader(path).state["recipe"])
    elif (recipe := _exported(exported) if exported.is_file() else None) is None:
        raise RunError(no_run(path, f"{RECIPE}, nor is it an export of one: none in config.json"))
    if recipe.stage != stage:
        raise RunError(f"{path}: is a {recipe.stage} run, expected a {stage} run")
    return recipe


def has_checkpoints(path: Path) -> bool:
    """Whether `path` is a run folder or a checkpoint, and not an export."""
    return (path / RECIPE).is_file() or is_checkpoint(path)


def has_recipe(path: Path) -> bool:
    """Whether `path` is a run folder, a checkpoint or an export with its recipe, which `stored_recipe` reads."""
    exported = path / "config.json"
    return has_checkpoints(path) or (exported.is_file() and _exported(exported) is not None)


def is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def run_and_step(path: Path) -> tuple[Path, int | None]:
    """The run folder of the weights at `path`, a run or a checkpoint of one, and their step; of an export `path` and
    None."""
    path = path.resolve()
    if is_checkpoint(path):
        run = next((parent for parent in path.parents if (parent / RECIPE).is_file()), path)
        return run, CheckpointReader(path).step
    return path, newest_step(path) or None


def checkpoint_weights(path: Path, rank: int = 0, ranks: int = 1, gather: Gather = single_process) -> CheckpointWeights:
    """The weights of a run's newest checkpoint that verifies, or of the checkpoint `path`; the EMA if it has one. The
    ranks divide the hashing, and all of them call this. RunError if none verifies."""
    single = is_checkpoint(path)
    store = Store(path.parent if single else path / "checkpoints")
    others = [step for step in store.steps() if single and store.folder(step).name != path.name]
    reader = store.newest_verified(others, rank, ranks, gather, slots=SLOTS)
    if reader is None:
        what = "is not a checkpoint that verifies" if single else "has no checkpoint that passes verification"
        raise RunError(f"{path}: {what}")
    return CheckpointWeights(reader, next(slot for slot in SLOTS if slot in reader.slots))


def _exported(file: Path) -> Recipe | None:
    """The recipe in an export's `config.json`; None if it contains none."""
    try:
        found = json.loads(file.read_bytes())
        stored = found.get("recipe") if isinstance(found, dict) else None
        return None if stored is None else Recipe.model_validate(with_new_names(stored))
    except ValidationError as error:
        raise RunError(f"{file}: {explain(error, Recipe)}; fix it there, or export the run again") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: is not JSON ({error}); export the run again") from error
