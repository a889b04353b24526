"""The inputs of a run, opened and checked before anything is built or written."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...data import Dataset, MixedDataset, Plan, SampleOrder, open_dataset
from ...data.bucketed_plan import BucketedPlan
from ...data.buckets import Buckets, open_buckets
from ...data.spread import Broadcast
from ...data.units import counted
from ...recipes.schema import Data
from ...recipes.secrets import HIDDEN
from ..distributed.process_group import Gather, Ranks, single_process
from ..errors import RunError
from ..io import read_json
from ..models.hub import from_cache
from ..stages import VALIDATION_SEED, Stage
from ..stages.training_data import caption_choice, open_training_data
from .mixture import Segments, continued, held_by_source, mixed_plan, stored_segments
from .setting_changes import FIXED, check_stage, check_unchanged

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Data, plan and stage of a run."""

    dataset: Dataset
    plan: SampleOrder
    stage: Stage
    global_batch: int
    segments: Segments = ()
    """With `data.sources`: the parts of the sequence with the same sources and weights."""
    buckets: Buckets | None = None
    """With `data.buckets`: those of the dataset."""

    def resumed(self, data: Data, seed: int, state: dict[str, Any] | None, batch: int, folder: Path) -> Inputs:
        """The inputs of a run that continues at global batch `batch` from the checkpoint in `folder` with JSON `state`,
        None for a new run."""
        if not isinstance(self.dataset, MixedDataset):
            return self
        held = held_by_source(self.dataset, self.buckets)
        segments = continued(stored_segments(state), data, self.dataset, batch, str(folder), held)
        return self.with_segments(data, seed, segments)

    def with_segments(self, data: Data, seed: int, segments: Segments) -> Inputs:
        """The inputs with a mixture's `segments`, the last of which has the sources of the dataset."""
        assert isinstance(self.dataset, MixedDataset)
        plan = mixed_plan(segments, self.dataset, data, self.global_batch, seed, self.buckets)
        return replace(self, plan=plan, segments=segments)

    def normalizer(self, step: int, passes: int) -> float:
        """See `Stage.normalizer`, for the samples of global step `step`."""
        located = self.plan.locate(np.arange(step * self.global_batch, (step + 1) * self.global_batch))
        bucket = self.plan.bucket(step) if isinstance(self.plan, BucketedPlan) else 0
        return self.stage.normalizer(located.epoch, located.index, passes, bucket)


def open_inputs(
    data: Data,
    seed: int,
    global_batch: int,
    stage: Callable[[], Stage],
    rank: int = 0,
    gather: Gather = single_process,
    broadcast: Broadcast | None = None,
) -> Inputs:
    """Open everything that a run reads; the ranks that `gather` connects divide the reading of shards. Raises RunError
    or DataError for an input that cannot be used. seed: of the sample order and the choice of
    captions; stage: opens the stage."""
    key = "data.shards" if data.sources is None else "data.sources"
    _require_signature(key, data.named)
    dataset = open_training_data(data, seed, rank, gather, broadcast)
    if len(dataset) < global_batch:
        raise RunError(
            f"{key} hold {counted(len(dataset), 'sample')} in {counted(len(dataset.shards), 'shard')}, fewer than"
            f" one global_batch of {global_batch}: lower global_batch or add shards"
        )
    # The first rank of each node downloads models from the hub; the others read its cache.
    opened = stage() if os.environ.get("LOCAL_RANK", "0") == "0" else None
    gather(None)
    if opened is None:
        with from_cache():
            opened = stage()
    if opened.bucket_rule is None:
        plan, buckets = Plan(dataset.samples_per_shard, seed, data.shuffle_window), None
    else:
        buckets = open_buckets(dataset, opened.bucket_rule, rank, gather)
        _check_buckets(buckets, global_batch, shown=rank == 0)
        plan = BucketedPlan(buckets, dataset.samples_per_shard, global_batch, seed, data.shuffle_window)
    return Inputs(dataset, plan, opened, global_batch, buckets=buckets).resumed(data, seed, None, 0, Path())


def _check_buckets(buckets: Buckets, global_batch: int, shown: bool) -> None:
    """RunError when too few samples are in a bucket; a warning of those that are in none, if `shown`."""
    used = len(buckets.of) - buckets.left_out
    if used < global_batch:
        raise RunError(
            f"data.buckets: {counted(used, 'sample')} of {len(buckets.of):,} are in a bucket, fewer than one"
            f" global_batch of {global_batch}; lower it, or raise data.buckets.max_upscale"
        )
    if buckets.left_out and shown:
        small = buckets.left_out - buckets.unknown
        log.warning(
            f"data.buckets: {buckets.left_out:,} of {counted(len(buckets.of), 'sample')} left out: {small:,} would be"
            f" enlarged more than data.buckets.max_upscale, {buckets.unknown:,} without a valid header"
        )


def open_held_out(shards: str | list[str] | None, data: Data, training: Dataset, ranks: Ranks) -> Dataset | None:
    """The data of `validation.shards`, with `data.captions`, and indexes where those of the `training` data are. If a
    source has editing pairs, held-out samples with a source image are some, too. RunError if some of it is training
    data, also under another name."""
    if shards is None:
        return None
    _require_signature("validation.shards", shards)
    choice = caption_choice(data.captions, VALIDATION_SEED, "used" if data.edits else "ignored")
    held_out = open_dataset(
        shards,
        rank=ranks.rank,
        gather=ranks.gather,
        broadcast=ranks.broadcast,
        captions=choice,
        index_dir=training.index_dir,
    )
    kept = {header.sha256: shard for shard, header in zip(held_out.shards, held_out.headers, strict=True)}
    for shard, header in zip(training.shards, training.headers, strict=True):
        if header.sha256 in kept:
            raise RunError(
                f"validation.shards: {kept[header.sha256]} is training data, {shard} of"
                f" data.{'sources' if isinstance(training, MixedDataset) else 'shards'}; name held-out shards"
            )
    return held_out


def _require_signature(key: str, shards: str | list[str]) -> None:
    if HIDDEN in str(shards):
        raise RunError(f"{key} was stored without the signature of its address: give it again, {key}=…")


def check_continuation(
    settings: dict[str, Any], inputs: Inputs, backbone_hash: str, state: dict[str, Any], folder: Path
) -> None:
    """RunError when the checkpoint in `folder`, with JSON `state`, is not of the run with these `settings`."""
    name = settings["name"]
    check_stage(settings, state["recipe"], folder)  # first: between stages everything else differs too
    check_unchanged(settings, state["recipe"], inputs.stage.identity, folder)  # they determine which weights are used
    if state["backbone"] != backbone_hash:
        raise RunError(
            f"{folder}: was trained on other frozen weights than {inputs.stage.source} (content hash"
            f" {state['backbone'][:12]}, here {backbone_hash[:12]}): set that back, or take another name than {name}"
        )
    mixed = isinstance(inputs.dataset, MixedDataset)
    if "mixture" in state and not mixed:
        raise RunError(
            f"{folder}: was trained with data.sources: give them instead of data.shards (one is enough), or take"
            f" another name than {name}"
        )
    if not mixed and state["data"] != inputs.dataset.fingerprint:
        differ = difference(folder.parents[1], inputs.dataset, state["data"])
        raise RunError(
            f"{folder}: was trained on other shards than data.shards={settings['data']['shards']} ({differ}): restore"
            f" them, or take another name than {name}"
        )
    check_unchanged(settings, state["recipe"], FIXED, folder)


def difference(run: Path, dataset: Dataset, trained_on: str) -> str:
    """How `dataset` differs from the one with the fingerprint `trained_on`, whose size is in the folder `run`."""
    before = (read_json(run / "environment.json") or {}).get("dataset")
    now = f"{counted(len(dataset), 'sample')} in {counted(len(dataset.shards), 'shard')}"
    if isinstance(before, dict) and before.get("fingerprint") == trained_on:
        then = f"{counted(before['samples'], 'sample')} in {counted(before['shards'], 'shard')}"
        if then != now:
            return f"{then} then, {now} now"
    return "content differs"
