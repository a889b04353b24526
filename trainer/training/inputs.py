"""The inputs of a run, opened and checked before anything is built or written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...data import Dataset, Plan, open_dataset
from ...recipes import Recipe
from ...recipes.secrets import HIDDEN
from ...slurm.named_paths import require_paths
from ..distributed.process_group import Gather, alone
from ..errors import RunError
from ..models.hub import architecture, from_cache
from ..stages import Stage, open_stage
from .batch import batch_arithmetic


@dataclass(frozen=True)
class Inputs:
    """Data, plan and stage of a run."""

    recipe: Recipe
    dataset: Dataset
    plan: Plan
    stage: Stage

    def normalizer(self, step: int, passes: int) -> float:
        """See `Stage.normalizer`, for the samples of global step `step`."""
        batch = self.recipe.global_batch
        located = self.plan.locate(np.arange(step * batch, (step + 1) * batch))
        return self.stage.normalizer(located.epoch, located.index, passes)


def open_inputs(recipe: Recipe, ranks: int, rank: int = 0, gather: Gather = alone) -> Inputs:
    """Open everything that `recipe` names; the ranks that `gather` connects divide the reading of shards. Raises
    RunError or DataError for an input that cannot be used."""
    batch_arithmetic(recipe, ranks)
    if HIDDEN in str(recipe.data.shards):
        raise RunError("data.shards was stored without the signature of its address: give it again, data.shards=…")
    dataset = open_dataset(recipe.data.shards, rank=rank, gather=gather)
    if len(dataset) < recipe.global_batch:
        raise RunError(
            f"data.shards hold {len(dataset)} samples in {len(dataset.shards)} shards, fewer than one global_batch"
            f" of {recipe.global_batch}: lower global_batch or add shards"
        )
    # The first rank of each node downloads models from the hub; the others read its cache.
    stage = open_stage(recipe) if os.environ.get("LOCAL_RANK", "0") == "0" else None
    gather(None)
    if stage is None:
        with from_cache():
            stage = open_stage(recipe)
    return Inputs(recipe, dataset, Plan(dataset.samples_per_shard, recipe.seed, recipe.data.shuffle_window), stage)


def require_places(recipe: Recipe) -> None:
    """`require_paths`, and RunError for a missing FLUX of the previews; the stage's own models were checked when it was
    opened."""
    require_paths(recipe)
    if recipe.previews.every and recipe.previews.flux:
        architecture(recipe.previews.flux, None, "previews.flux")


# Settings that decide what is trained and on which sequence: a run that continues must not change them.
IDENTITY = (
    "stage",
    "seed",
    "global_batch",
    "data.image_size",
    "data.shuffle_window",
    "ema",
)


def check_continuation(inputs: Inputs, backbone_hash: str, state: dict[str, Any], folder: Path) -> None:
    """RunError when the checkpoint in `folder`, with JSON `state`, is not of this run."""
    name = inputs.recipe.name
    stage = state["recipe"]["stage"]
    if stage != inputs.recipe.stage:  # checked first: between stages everything else differs too
        raise RunError(
            f"{folder}: the run {name} is of stage {stage}, this recipe of stage {inputs.recipe.stage}: give it another"
            " name, such as name=mine"
        )
    if state["backbone"] != backbone_hash:
        raise RunError(
            f"{folder}: was trained on other frozen weights than {inputs.stage.source} (content hash"
            f" {state['backbone'][:12]}, here {backbone_hash[:12]}): set that back, or take another name than {name}"
        )
    if state["data"] != inputs.dataset.fingerprint:
        raise RunError(
            f"{folder}: was trained on other shards than data.shards={inputs.recipe.data.shards} (content differs):"
            f" restore them, or take another name than {name}"
        )
    here = inputs.recipe.model_dump(mode="json")
    for key in (*IDENTITY, *inputs.stage.identity):
        before, now = _at(state["recipe"], key), _at(here, key)
        if before != now:
            raise RunError(
                f"{folder}: {key} was {before} in this run and is {now} now: set it back, or take another name"
                f" than {name}"
            )


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
