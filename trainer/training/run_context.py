"""Opens a run on one of its ranks: process group, inputs, lock, heartbeat and watchdog."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from ...data import Dataset
from ...recipes import BatchSplit, Recipe
from ..checkpoint.uploading import claim
from ..distributed.process_group import Ranks, join
from ..distributed.run_lock import BEAT_S, RunLock
from ..distributed.stop_signals import StopSignals
from ..distributed.topology import check_ranks
from ..errors import RunError
from ..inference.predicted_latents import PredictedOutputs
from ..monitors.heartbeat import Heartbeat
from ..monitors.phase_timer import PhaseTimer
from ..monitors.trackers import chosen, require_installed
from ..monitors.watchdog import Watchdog
from ..optim.deepspeed_config import deepspeed_config
from ..stages import Stage, open_stage
from .batch import split_batch
from .inputs import Inputs, open_held_out, open_inputs

ENDS_AT = "BIFROST_ENDS_AT"


@dataclass(frozen=True)
class RunContext:
    """Run-wide services created before training starts, and the run's inputs."""

    recipe: Recipe
    batch: BatchSplit
    deepspeed: dict[str, Any]
    """DeepSpeed's configuration."""
    inputs: Inputs
    held_out: Dataset | None
    """The data of `validation.shards`."""
    ranks: Ranks
    folder: Path
    stop: StopSignals
    ends_at: float
    """Unix time of the job's time limit; infinity without one."""
    phases: PhaseTimer
    heartbeat: Heartbeat
    previous_owner: dict[str, Any] | None
    """Owner of the lock that the previous attempt left behind, if it died."""
    topology: list[str]
    """The ranks, one line per host."""
    hosts: Sequence[str]
    """Host of every rank."""


def open_run_stage(recipe: Recipe) -> Stage:
    """The recipe's stage, with what predicts its latents if it uses such; see `open_stage`."""
    return open_stage(recipe, predictor=PredictedOutputs.open)


@contextmanager
def open_run(recipe: Recipe) -> Iterator[RunContext]:
    """Join the other ranks, open the inputs and take the lock of the run that `recipe` names; everything is
    released at the end. RunError and DataError are raised on every rank alike."""
    stop = StopSignals()
    ends_at = _ends_at()
    phases = PhaseTimer()
    folder = Path(recipe.runs_dir) / recipe.name
    bounds = recipe.watchdog
    with Watchdog(bounds, phases) as watchdog:
        # The collectives' timeout is longer than the watchdog's, whose report has more detail.
        ranks = join(
            timedelta(seconds=max(bounds.startup_timeout_s, bounds.save_timeout_s) + 300), bounds.startup_timeout_s / 5
        )
        stop.joined = True
        topology = check_ranks(ranks)
        if ranks.first and (len(topology) > 1 or "SLURM_STEP_ID" in os.environ):
            print("\n".join(topology), flush=True)
        batch = ranks.agreed(lambda: split_batch(recipe.global_batch, recipe.micro_batch, ranks.size, recipe.zero.hpz))
        if recipe.tracking.enabled:
            to = chosen(recipe.tracking.to, recipe.tracking.prometheus)
            ranks.agreed(lambda: require_installed(to) if ranks.first else None)
        stage = partial(open_run_stage, recipe)
        inputs = ranks.agreed(
            lambda: open_inputs(
                recipe.data, recipe.seed, batch.global_batch, stage, ranks.rank, ranks.gather, ranks.broadcast
            )
        )
        held_out = ranks.agreed(lambda: open_held_out(recipe.validation.shards, recipe.data, inputs.dataset, ranks))
        with RunLock(folder) as lock, Heartbeat(BEAT_S) as heartbeat:
            stop.at_quit += [lock.release, watchdog.remove_empty_stacks]
            previous = ranks.agreed(lambda: lock.acquire() if ranks.first else None)
            if ranks.first:
                heartbeat.actions.append(lambda: lock.beat(phases.step))
            note = ranks.agreed(lambda: _claim(recipe.checkpoint.upload, folder) if ranks.first else None)
            if note:
                print(note, flush=True)
            hosts = ranks.agreed(lambda: watchdog.attach(ranks, folder))
            yield RunContext(
                recipe=recipe,
                batch=batch,
                deepspeed=deepspeed_config(
                    batch, recipe.precision, recipe.zero, recipe.optimizer.clip, ranks.device.type == "cpu"
                ),
                inputs=inputs,
                held_out=held_out,
                ranks=ranks,
                folder=folder,
                stop=stop,
                ends_at=ends_at,
                phases=phases,
                heartbeat=heartbeat,
                previous_owner=previous,
                topology=topology,
                hosts=hosts,
            )


def _claim(address: str | None, folder: Path) -> str | None:
    """Check that checkpoints can be copied to `address`; a note if its storage does not answer."""
    if address is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return claim(folder, address)


def _ends_at() -> float:
    """Unix time of the job's end, exported by the batch script; infinity without it."""
    text = os.environ.get(ENDS_AT)
    try:
        return float(text or "inf")
    except ValueError:
        raise RunError(f"{ENDS_AT}={text}: want the Unix time of the job's end, or nothing") from None
