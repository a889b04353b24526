"""The model of a run, sharded over its ranks, with its initial weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..checkpoint.state import load_weights
from ..checkpoint.store import Store
from ..distributed.process_group import Ranks
from ..errors import RunError
from ..models.weights import fill
from ..optim.engine import partitioned
from ..stages import Stage, StageModel
from .run_context import RunContext


def build_model(run: RunContext, new: bool) -> StageModel:
    """The sharded model, with its stage's weights, and `init_from`'s in a new run."""
    recipe, stage, ranks = run.recipe, run.inputs.stage, run.ranks
    # Has collectives, so it is not under `agreed`: a rank that fails here exits.
    with partitioned(run.deepspeed, ranks.device):
        model = stage.build(recipe.activation_checkpointing)

    def load() -> None:
        stage.load(model)
        if new and recipe.init_from:
            initialise_from(model, recipe.stage, stage, Path(recipe.init_from), ranks)

    ranks.agreed(load)
    return model


def initialise_from(model: StageModel, kind: str, stage: Stage, path: Path, ranks: Ranks | None = None) -> None:
    """Load the weights of an earlier run's newest checkpoint, or of an export in either layout. kind: the
    recipe's `stage`, of which that run has to be. Every rank of `ranks` calls it."""
    if (path / "checkpoints").is_dir():
        store = Store(path / "checkpoints")
        ranks = ranks or Ranks(0, 1, torch.device("cpu"))
        reader = store.newest_verified((), ranks.rank, ranks.size, ranks.gather, slots=("master",))
        if reader is None:
            raise RunError(f"init_from={path}: that run has no checkpoint that verifies")
        if (theirs := reader.state["recipe"]["stage"]) != kind:
            raise RunError(f"init_from={path}: is a {theirs} run, expected a {kind} run")
        load_weights(model, reader)
    elif path.exists():
        source, names = stage.from_public_checkpoint(path)
        tensors: dict[str, Any] = {**model.trainable(), **model.statistics()}
        fill({names[name]: tensor for name, tensor in tensors.items()}, source, path)
    else:
        raise RunError(f"init_from={path}: no such file or folder")
