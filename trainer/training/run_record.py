"""What a run records: the description in its folder, its metrics, its first console line, its trackers."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ...data.atomic import write_atomic
from ...data.units import counted
from ...recipes.secrets import redact
from ...slurm.io import write_json
from ...slurm.rank_env import host_name
from ..checkpoint.uploading import start_uploads
from ..distributed.companion import Companion
from ..distributed.process_group import Ranks
from ..errors import RunError
from ..models.kernel_selection import FILE as KERNELS_FILE
from ..models.weights import full_shape
from ..monitors.console import Console, log_to_file
from ..monitors.goodput import AccountedMetrics
from ..monitors.renames import rename_previews
from ..monitors.trackers import chosen
from ..monitors.tracking import Mirror, start_mirror
from ..optim.engine import Engine
from ..optim.train_state import TrainState
from ..versions import DISTRIBUTION, versions
from .mixture import FILE as MIXTURE_FILE
from .mixture import new_segments, to_json
from .resume_point import ResumePoint, statistics_warning
from .run_context import RunContext
from .setting_changes import changes, describe, last_settings

log = logging.getLogger(__name__)

VERSIONS = (DISTRIBUTION, "torch", "deepspeed", "transformers", "triton", "webdataset", "mlflow", "numpy")


@dataclass(frozen=True)
class RunRecord:
    """settings: the recipe's, as stored in checkpoints. mirror: sends the metrics to trackers, uploads: copies
    checkpoints to `checkpoint.upload`, both only on rank 0."""

    settings: dict[str, Any]
    metrics: AccountedMetrics
    console: Console
    mirror: Mirror | None
    uploads: Companion | None


def open_record(run: RunContext, point: ResumePoint, engine: Engine, kernels: dict[str, dict[str, Any]]) -> RunRecord:
    """Describe this attempt in the run folder and print its first line. RunError on every rank if the folder cannot be
    written. kernels: the record for `kernels.json`."""
    ranks, recipe, progress, reader = run.ranks, run.recipe, point.progress, point.reader
    # Every rank passes the same records; only those of rank 0 are stored.
    metrics = AccountedMetrics(run.folder / "metrics.jsonl" if ranks.first else os.devnull)
    begun = psutil.Process().create_time()
    # Read before the folder describes this attempt.
    settings = json.loads(redact(recipe.model_dump_json()))
    last = ranks.agreed(lambda: last_settings(run.folder))
    # The folder may have settings of an attempt that was killed before its first save: nothing was trained with them.
    changed = changes(settings, reader.state["recipe"] if reader else last)

    def open_folder() -> dict[str, float]:
        try:
            if ranks.first:
                _describe(run, kernels)
            log_to_file(run.folder / "logs", ranks.rank)
            return metrics.resume(progress.step, begun, run.previous_owner)
        except OSError as error:  # ENOSPC is raised without a file name
            raise RunError.from_storage_error(error.filename or run.folder, error) from error

    past = ranks.agreed(open_folder)
    for operation, choice in kernels.items():
        log.info("%s by %s: %s", operation, choice["provider"], choice["reason"])
    console = Console(recipe.steps, progress.step, shown=ranks.first)
    start = {"event": "start", "step": progress.step, "batch": progress.batch, "ranks": ranks.size}
    startup = time.time() - begun
    metrics.write({**start, "micro_batch": recipe.micro_batch, "startup_s": startup, **past})
    if changed:
        metrics.write({"event": "settings_changed", "step": progress.step, "changes": changed})
    mixtures = new_segments(run.inputs.segments, reader.state if reader else None)
    for mixture in mixtures:
        event = {"event": "mixture", "step": progress.step, "batch": mixture.batch}
        metrics.write({**event, "sources": mixture.described()})
    if ranks.first:
        metrics.store()
        run.heartbeat.actions.append(metrics.store)
    console.say(_greeting(run, engine, progress))
    if changed:
        console.say(f"settings changed since {'the checkpoint' if reader else 'the last attempt'}: {describe(changed)}")
    for mixture in mixtures:
        console.say(f"sources from global batch {mixture.batch + 1} on: {mixture}")
    if reader and (warning := statistics_warning(engine.model, reader, run.batch.micro_batch * ranks.size)):
        console.say(warning)
    tracked = ranks.first and recipe.tracking.enabled
    to = chosen(recipe.tracking.to, recipe.tracking.prometheus)
    mirror = ranks.agreed(lambda: start_mirror(run.folder, to, console.say) if tracked else None)
    address, keep = recipe.checkpoint.upload, recipe.checkpoint.keep
    uploads = start_uploads(run.folder, address, keep, console.say) if ranks.first and address else None
    return RunRecord(settings, metrics, console, mirror, uploads)


def _describe(run: RunContext, kernels: dict[str, Any]) -> None:
    """Write the run's recipe, DeepSpeed configuration, kernels, data and environment."""
    folder, ranks, recipe, data = run.folder, run.ranks, run.recipe, run.inputs.dataset
    dataset = {"shards": len(data.shards), "samples": len(data), "fingerprint": data.fingerprint}
    folder.mkdir(parents=True, exist_ok=True)
    rename_previews(folder)
    # First, so that an attempt that dies here leaves a recipe.
    write_atomic(folder / "recipe.yaml", redact(recipe.to_yaml()).encode())
    write_json(folder / "ds_config.json", run.deepspeed)
    write_json(folder / KERNELS_FILE, kernels)
    if run.inputs.segments:
        write_json(folder / MIXTURE_FILE, {"segments": to_json(run.inputs.segments)})
    write_json(folder / "environment.json", {**_environment(ranks), "dataset": dataset, "hosts": run.topology})


def _environment(ranks: Ranks) -> dict[str, Any]:
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.processor() or "cpu"
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "ranks": ranks.size,
        "device": device,
        "host": host_name(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "versions": versions(VERSIONS),
    }


def _greeting(run: RunContext, engine: Engine, progress: TrainState) -> str:
    recipe, batch = run.recipe, run.batch
    trainable = sum(math.prod(full_shape(p)) for p in engine.trainable().values())
    # Counted in the files: not all frozen weights are parameters of the engine's model.
    frozen = sum(math.prod(files.shape(name) or ()) for files, names in run.inputs.stage.frozen() for name in names)
    begin = f"continues at step {progress.step}" if progress.step else "begins"
    return (
        f"{recipe.name} {begin} in {run.folder}: {trainable:,} trainable and {frozen:,} frozen parameters,"
        f" {counted(batch.ranks, 'rank')} x {batch.micro_batch} x {batch.passes} = {batch.global_batch}"
        f" samples per step, {counted(recipe.steps, 'step')}, {recipe.precision} on {run.ranks.device.type}"
    )
