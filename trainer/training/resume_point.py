"""Where a run continues: from its newest valid checkpoint, or from step 0."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.local import LocalParts
from ..checkpoint.reader import CheckpointReader
from ..checkpoint.store import Store
from ..distributed.process_group import Ranks
from ..errors import RunError
from ..monitors.metrics import read_events
from ..optim.train_state import TrainState
from ..stages import Stage, StageModel
from .inputs import Inputs, check_continuation
from .run_context import RunContext


@dataclass(frozen=True)
class ResumePoint:
    """reader: of the checkpoint to resume from, None for a new run. frozen_hash: content hash of the frozen weights.
    inputs: the run's, with the sequence of samples from here on."""

    store: Store
    local: LocalParts | None
    reader: CheckpointReader | None
    frozen_hash: str
    progress: TrainState
    inputs: Inputs


def find_resume_point(run: RunContext) -> ResumePoint:
    """The checkpoint to continue from, checked to be this run's. RunError on every rank if there should be one and is
    not."""
    ranks, recipe = run.ranks, run.recipe
    store = Store(run.folder / "checkpoints")
    frozen_hash = ranks.agreed(lambda: _frozen_hash(run.inputs.stage, ranks))
    local = ranks.agreed(lambda: _local(recipe.checkpoint.local, recipe.name, store, ranks))
    settings = recipe.model_dump(mode="json")
    reader = ranks.agreed(lambda: _newest(store, settings, run.inputs, frozen_hash, ranks))
    progress = _progress(reader)
    return ResumePoint(store, local, reader, frozen_hash, progress, _inputs(run, reader, progress))


def older_resume_point(run: RunContext, point: ResumePoint, refused: Collection[int]) -> ResumePoint:
    """The point of the newest checkpoint other than those `refused`, of which there is at least one. RunError on every
    rank if none is valid."""
    settings = run.recipe.model_dump(mode="json")
    reader = run.ranks.agreed(lambda: _newest(point.store, settings, run.inputs, point.frozen_hash, run.ranks, refused))
    progress = _progress(reader)
    return replace(point, reader=reader, progress=progress, inputs=_inputs(run, reader, progress))


def _inputs(run: RunContext, reader: CheckpointReader | None, progress: TrainState) -> Inputs:
    """The inputs with the sequence of samples of a run that continues from `reader`."""
    recipe, folder = run.recipe, reader.folder if reader else run.folder
    state = reader.state if reader else None
    return run.ranks.agreed(lambda: run.inputs.resumed(recipe.data, recipe.seed, state, progress.batch, folder))


def _progress(reader: CheckpointReader | None) -> TrainState:
    return TrainState(**reader.state["progress"]) if reader else TrainState()


def _frozen_hash(stage: Stage, ranks: Ranks) -> str:
    """Content hash of the frozen weights that the run uses, and of those that predict its inputs."""
    parts = []
    for files, names in stage.frozen():
        files.require(names)
        parts.append(files.content_hash(names, ranks.rank, ranks.size, ranks.gather))
    for predicting, names in stage.predicting():
        parts.append(predicting.content_hash(names, ranks.rank, ranks.size, ranks.gather))
    return parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _local(place: str | None, name: str, store: Store, ranks: Ranks) -> LocalParts | None:
    """The checkpoints on the nodes' local disks, reassembled if nodes were replaced."""
    if not place:
        return None
    local = LocalParts(place, store, name, ranks.rank, ranks.gather)
    local.recover(store, ranks.gather)
    return local


def _newest(
    store: Store,
    settings: dict[str, Any],
    inputs: Inputs,
    frozen_hash: str,
    ranks: Ranks,
    refused: Collection[int] = (),
) -> CheckpointReader | None:
    """The checkpoint to continue from, other than those `refused`, checked to be of the run with these `settings`; None
    for a new run."""
    reader = store.newest_verified(refused, ranks.rank, ranks.size, ranks.gather, while_loaded=True)
    if reader is None and (steps := ranks.gather(store.steps())[0]):
        raise RunError(
            f"{store.root}: none of its {len(steps)} checkpoints verifies, see `bifrost checkpoint verify"
            f" {store.root.parent}`; restore one, or move the folder away to start over"
        )
    if reader is not None:
        check_continuation(settings, inputs, frozen_hash, reader.state, reader.folder)
    elif saved := ranks.gather(_last_saved(store.root.parent) if ranks.first else 0)[0]:
        raise RunError(
            f"{store.root}: holds no checkpoint, but this run saved one at step {saved}; put it back, or move"
            f" {store.root.parent} away to start over"
        )
    return reader


def _last_saved(folder: Path) -> int:
    """The last step that the run in `folder` recorded a save of; 0 without any."""
    saves = [event for event in read_events(folder / "metrics.jsonl") if event["event"] == "checkpoint"]
    return saves[-1]["step"] if saves else 0


def statistics_warning(model: StageModel, reader: CheckpointReader, now: int) -> str | None:
    """A warning when a run with BatchNorm continues with another batch size for its statistics. now: samples per
    micro-batch, over all ranks."""
    before = reader.state["recipe"]["micro_batch"] * reader.ranks
    if not model.batch_statistics or before == now:
        return None
    return (
        f"warning: controlnet.norm=batch: BatchNorm's statistics now cover {now} samples (micro_batch x ranks),"
        f" {before} before: losses differ by more than rounding; set micro_batch so that it is {before} again"
        " for the same training"
    )
