"""One rank of a run: recipe -> model, engine, data, monitors -> loop."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch

from ...data import Batch, Loader, worker_failure
from ...data.atomic import write_atomic
from ...recipes import Recipe, to_yaml
from ...recipes.secrets import redact
from ...slurm.exit_codes import DONE, STOPPED
from ...slurm.exit_record import grace, stop_s
from ..checkpoint.local import LocalParts
from ..checkpoint.manager import Saver
from ..checkpoint.reader import CheckpointReader
from ..checkpoint.state import capture, capture_statistics, restore, take_from
from ..checkpoint.store import Store
from ..distributed.process_group import Ranks, join
from ..distributed.run_lock import BEAT_S, RunLock
from ..distributed.stop_signals import ENDING, TRAINING, StopSignals
from ..distributed.topology import check_ranks
from ..errors import RunError
from ..io import write_json
from ..models.kernel_selection import FILE as KERNELS_FILE
from ..models.kernel_selection import make_deterministic
from ..models.weights import fill, full_shape
from ..monitors.console import Console, log_to_file
from ..monitors.goodput import AccountedMetrics
from ..monitors.heartbeat import Heartbeat
from ..monitors.metrics import read_metrics
from ..monitors.phase_timer import Sections
from ..monitors.rank_stats import Spread
from ..monitors.stragglers import Stragglers
from ..monitors.tracking import start_mirror
from ..monitors.utilisation import Utilisation
from ..monitors.watchdog import Watchdog
from ..optim.ema import Ema
from ..optim.engine import Engine, deepspeed_config, partitioned, require_quantizer
from ..optim.train_state import Progress
from ..planner.devices import this_device
from ..stages import Stage, StageModel
from ..stages.patch_latents import PatchLatentStage
from ..versions import DISTRIBUTION, versions
from . import loop
from .inputs import Inputs, check_continuation, open_inputs
from .loop import Parts
from .preview import sampler
from .rollback import Recovery
from .setting_changes import changes, describe, last_settings

log = logging.getLogger(__name__)

ENDS_AT = "BIFROST_ENDS_AT"
VERSIONS = (DISTRIBUTION, "torch", "deepspeed", "transformers", "triton", "webdataset", "mlflow", "numpy")


def train(recipe: Recipe, after_step: Callable[[Progress], None] = lambda progress: None) -> int:
    """Train or continue the run that `recipe` names, as one of its ranks. Returns the exit code.

    after_step: called at the end of every step, on every rank.

    RunError and DataError are raised on every rank alike; nothing of an earlier run is written over before all checks
    have passed.
    """
    if recipe.kernels.deterministic:
        make_deterministic()
    stop = StopSignals()
    ends_at = _ends_at()
    sections = Sections()
    with Watchdog(recipe.watchdog, sections) as watchdog:
        # The collectives' own time limit comes after the watchdog's: it says more.
        bounds = recipe.watchdog
        ranks = join(timedelta(seconds=max(bounds.start_s, bounds.save_s) + 300), bounds.start_s / 5)
        stop.met = True
        table = check_ranks(ranks)
        if ranks.first and (len(table) > 1 or "SLURM_STEP_ID" in os.environ):
            print("\n".join(table), flush=True)
        inputs = ranks.agreed(lambda: open_inputs(recipe, ranks.size, ranks.rank, ranks.gather))
        with RunLock(Path(recipe.runs_dir) / recipe.name) as lock, Heartbeat(BEAT_S) as heartbeat:
            stop.at_quit += [lock.release, watchdog.leave_nothing]
            before = ranks.agreed(lambda: lock.acquire() if ranks.first else None)
            if ranks.first:
                heartbeat.actions.append(lambda: lock.beat(sections.step))
            return _train(inputs, ranks, Watch(stop, ends_at, sections, watchdog, heartbeat, before, table), after_step)


@dataclass(frozen=True)
class Watch:
    """What looks after a start from its first line on. ends_at: Unix time of the job's limit. before: the owner of a
    lock that its process died with. table: the ranks, one line a host."""

    stop: StopSignals
    ends_at: float
    sections: Sections
    watchdog: Watchdog
    heartbeat: Heartbeat
    before: dict[str, Any] | None
    table: list[str]


def _train(inputs: Inputs, ranks: Ranks, watch: Watch, after_step: Callable[[Progress], None]) -> int:
    """`train`, once the ranks have met, found their inputs and own the run."""
    recipe, section = inputs.recipe, watch.sections
    folder = Path(recipe.runs_dir) / recipe.name
    hosts = ranks.agreed(lambda: watch.watchdog.meet(ranks, folder))
    store = Store(folder / "checkpoints")
    frozen_hash = ranks.agreed(lambda: _frozen_hash(inputs.stage, ranks))
    local = ranks.agreed(lambda: _local(recipe, store, ranks))
    reader = ranks.agreed(lambda: _newest(store, inputs, frozen_hash, ranks))
    progress = Progress(**reader.state["progress"]) if reader else Progress()

    measured = ranks.agreed(lambda: inputs.stage.choose_kernels(ranks, folder))
    ranks.agreed(lambda: require_quantizer(recipe, ranks.device))
    model = _build(inputs, reader, ranks)
    engine = Engine(model, recipe, ranks)
    ema = Ema(engine.masters(), recipe.ema.decay, engine.model.statistics()) if recipe.ema else None
    if reader:
        ranks.agreed(lambda: restore(engine, ema, reader, reader.state["updates"]))

    # Every rank passes the same records; those of rank 0 are the run's.
    metrics = AccountedMetrics(folder / "metrics.jsonl" if ranks.first else os.devnull)
    begun = psutil.Process().create_time()
    section.step = progress.step

    def open_folder() -> dict[str, float]:
        try:
            if ranks.first:
                _describe(folder, inputs, ranks, measured, watch.table)
            log_to_file(folder / "logs", ranks.rank)
            return metrics.go_on(progress.step, begun, watch.before)
        except OSError as error:  # a full disk is reported without a name
            raise RunError.of_storage(error.filename or folder, error) from error

    # Before the folder describes this attempt.
    settings = json.loads(redact(recipe.model_dump_json()))
    last = ranks.agreed(lambda: last_settings(folder))
    # An attempt that was killed before its first save has left settings in the folder that nothing was trained with.
    changed = changes(settings, reader.state["recipe"] if reader else last)
    past = ranks.agreed(open_folder)
    for operation, choice in measured.items():
        log.info("%s by %s: %s", operation, choice["provider"], choice["reason"])
    console = Console(recipe.steps, progress.step, shown=ranks.first)
    start = {"event": "start", "step": progress.step, "batch": progress.batch, "ranks": ranks.size}
    startup = time.time() - begun
    metrics.write({**start, "micro_batch": recipe.micro_batch, "startup_s": startup, **past})
    if changed:
        metrics.write({"event": "settings_changed", "step": progress.step, "changes": changed})
    if ranks.first:
        metrics.store()
        watch.heartbeat.actions.append(metrics.store)
    console.say(_greeting(engine, folder, progress, inputs.stage, ranks))
    if changed:
        console.say(f"settings changed since {'the checkpoint' if reader else 'the last attempt'}: {describe(changed)}")
    if reader and (warning := _other_statistics(model, reader, recipe, ranks)):
        console.say(warning)
    tracked = ranks.first and recipe.tracking.enabled
    mirror = ranks.agreed(lambda: start_mirror(folder, console.say) if tracked else None)

    saver = Saver(
        store,
        recipe.checkpoint,
        capture(engine, ema)[0],
        metrics.write,
        ranks.rank,
        ranks.size,
        ranks.apart(),
        local,
        nodes=len(set(ranks.gather(platform.node()))),
        every=reader.state.get("save_every") if reader else None,
    )

    if ranks.first:
        guess = grace(folder)
        watch.stop.end_before(watch.ends_at, lambda: stop_s(section.median_step(), list(saver.seconds)) or guess)

    def save(progress: Progress) -> None:
        state = {
            "progress": asdict(progress),
            "updates": engine.updates,
            "recipe": settings,
            "backbone": frozen_hash,
            "data": inputs.dataset.fingerprint,
            "save_every": saver.every,
        }
        # Among bad steps nothing is pruned: the last checkpoint before them may be needed to go back to.
        prune = not progress.bad_in_a_row
        saver.save(progress.step, *capture(engine, ema), state, capture_statistics(engine, ema), prune)

    watch.stop.phase = TRAINING
    draw_samples = ranks.agreed(lambda: sampler(inputs.stage, engine, inputs.dataset, ranks, folder, section))

    if ranks.first:
        watch.stop.announce()

    def at_the_end_of_a_step(progress: Progress) -> None:
        draw_samples(progress)
        after_step(progress)

    loaders = ExitStack()

    def batches(progress: Progress) -> Iterator[Batch]:
        loaders.close()
        return iter(loaders.enter_context(closing(_loader(inputs, progress, ranks))))

    passes = ranks.size * recipe.accumulation(ranks.size)
    parts = Parts(
        recipe=recipe,
        stage=inputs.stage,
        ranks=ranks,
        engine=engine,
        ema=ema,
        batches=batches,
        normalizer=lambda batch: inputs.normalizer(batch, passes),
        save=save,
        saver=saver,
        recover=Recovery(recipe.health, saver, engine, ema, ranks, metrics, console),
        metrics=metrics,
        console=console,
        stop=watch.stop,
        sections=section,
        spread=Spread(ranks, Stragglers(ranks, hosts, metrics.write)),
        utilisation=_utilisation(inputs, ranks, hosts),
        after_step=at_the_end_of_a_step,
    )
    outcome = "failed"
    try:
        finished = loop.run(parts, progress)
        outcome = "finished" if finished else "stopped"
    except Exception as error:
        saver.abandon(timeout_s=60)
        raise worker_failure(error, ranks.rank) or error from error
    finally:
        if outcome != "failed":
            watch.stop.phase = ENDING
            if ranks.first:
                watch.stop.announce()
        loaders.close()
        console.close()
        metrics.write({"event": "end", "step": progress.step, "outcome": outcome})
        if ranks.first:
            metrics.store()
        if mirror is not None:
            with watch.stop.waiting():
                mirror.finish(timeout_s=60 if outcome == "finished" else 5)
    console.say(
        f"done: {progress.step} steps, {progress.samples} samples, run folder {folder}"
        if finished
        else f"stopped by {watch.stop.asked() or 'another rank'} at step {progress.step}, saved;"
        f" the same command or `bifrost resume {folder}` continues it"
    )
    # srun ends the other ranks as soon as one has left with a code that is not 0: nobody leaves before all are ready.
    ranks.barrier()
    return DONE if finished else STOPPED


def _ends_at() -> float:
    """Unix time at which the job is ended, as the batch script tells; infinity where nobody does."""
    text = os.environ.get(ENDS_AT)
    try:
        return float(text or "inf")
    except ValueError:
        raise RunError(f"{ENDS_AT}={text}: want the Unix time of the job's end, or nothing") from None


def _frozen_hash(stage: Stage, ranks: Ranks) -> str:
    """Content hash of the frozen weights that the run uses."""
    parts = []
    for files, names in stage.frozen():
        files.require(names)
        parts.append(files.content_hash(names, ranks.rank, ranks.size, ranks.gather))
    return parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _local(recipe: Recipe, store: Store, ranks: Ranks) -> LocalParts | None:
    """The checkpoints on the nodes' own disks, brought together where nodes were exchanged."""
    if not recipe.checkpoint.local:
        return None
    local = LocalParts(recipe.checkpoint.local, store, recipe.name, ranks.rank, ranks.gather)
    local.recover(store, ranks.gather)
    return local


def _newest(store: Store, inputs: Inputs, frozen_hash: str, ranks: Ranks) -> CheckpointReader | None:
    """The checkpoint to go on from, checked to be this run's; None for a new run."""
    reader = store.newest_verified(rank=ranks.rank, ranks=ranks.size, gather=ranks.gather)
    if reader is None and (steps := ranks.gather(store.steps())[0]):
        raise RunError(
            f"{store.root}: none of its {len(steps)} checkpoints verifies, see `bifrost checkpoint verify"
            f" {store.root.parent}`; restore one, or move the folder away to begin anew"
        )
    if reader is not None:
        check_continuation(inputs, frozen_hash, reader.state, reader.folder)
    elif saved := ranks.gather(_last_saved(store.root.parent) if ranks.first else 0)[0]:
        raise RunError(
            f"{store.root}: holds no checkpoint, but this run saved one at step {saved}; put it back, or move"
            f" {store.root.parent} away to begin anew"
        )
    return reader


def _last_saved(folder: Path) -> int:
    """The newest step that the run in `folder` noted a save of; 0 where it noted none."""
    path = folder / "metrics.jsonl"
    saves = [record for record in read_metrics(path) if record.get("event") == "checkpoint"] if path.exists() else []
    return saves[-1]["step"] if saves else 0


def _other_statistics(model: StageModel, reader: CheckpointReader, recipe: Recipe, ranks: Ranks) -> str | None:
    """A warning where a run with BatchNorm continues with other statistics than it began with."""
    before, now = reader.state["recipe"]["micro_batch"] * reader.ranks, recipe.micro_batch * ranks.size
    if not model.statistics() or before == now:
        return None
    return (
        f"warning: controlnet.norm=batch: BatchNorm's statistics now go over {now} samples (micro_batch x ranks),"
        f" {before} before: losses differ by more than rounding; set micro_batch so that it is {before} again, if it is"
        " to be the same training"
    )


def _build(inputs: Inputs, reader: CheckpointReader | None, ranks: Ranks) -> StageModel:
    """The model, cut over the ranks, with its stage's weights, then `init_from`'s, then the checkpoint's."""
    recipe, stage = inputs.recipe, inputs.stage
    with partitioned(recipe, ranks):  # with collectives: who fails here leaves, and is not waited for
        model = stage.build()

    def load() -> None:
        stage.load(model)
        if reader:
            take_from(model, reader)
        elif recipe.init_from:
            initialise_from(model, stage, Path(recipe.init_from), ranks)

    ranks.agreed(load)
    return model


def initialise_from(model: StageModel, stage: Stage, path: Path, ranks: Ranks | None = None) -> None:
    """Weights of an earlier run (its newest checkpoint), or of an export in either layout. Every rank of
    `ranks` calls it."""
    if (path / "checkpoints").is_dir():
        store = Store(path / "checkpoints")
        ranks = ranks or Ranks(0, 1, torch.device("cpu"))
        reader = store.newest_verified((), ranks.rank, ranks.size, ranks.gather, slots=("master",))
        if reader is None:
            raise RunError(f"init_from={path}: that run has no checkpoint that verifies")
        take_from(model, reader)
    elif path.exists():
        source, names = stage.released(path)
        tensors: dict[str, Any] = {**model.trainable(), **model.statistics()}
        fill({names[name]: tensor for name, tensor in tensors.items()}, source, path)
    else:
        raise RunError(f"init_from={path}: no such file or folder")


def _loader(inputs: Inputs, progress: Progress, ranks: Ranks) -> Loader:
    recipe = inputs.recipe
    return Loader(
        inputs.dataset,
        inputs.plan,
        inputs.stage.collate(),
        image_size=inputs.stage.image_sizes,
        rank=ranks.rank,
        ranks=ranks.size,
        global_batch=recipe.global_batch,
        micro_batch=recipe.micro_batch,
        start_step=progress.batch,
        stop_step=progress.batch + recipe.steps - progress.step,
        workers=recipe.data.workers,
        prefetch=recipe.data.prefetch,
        pin_memory=ranks.device.type == "cuda",
    )


def _utilisation(inputs: Inputs, ranks: Ranks, hosts: Sequence[str]) -> Utilisation:
    patches = inputs.stage.tokens_per_image if isinstance(inputs.stage, PatchLatentStage) else 0
    return Utilisation(inputs.recipe, ranks.size, hosts.count(hosts[0]), patches, this_device())


def _describe(folder: Path, inputs: Inputs, ranks: Ranks, kernels: dict[str, Any], table: list[str]) -> None:
    """Write what the run is: its recipe, DeepSpeed's configuration, its kernels, its data, and where it runs."""
    recipe, data = inputs.recipe, inputs.dataset
    dataset = {"shards": len(data.shards), "samples": len(data), "fingerprint": data.fingerprint}
    folder.mkdir(parents=True, exist_ok=True)
    # An attempt that dies here leaves a recipe.
    write_atomic(folder / "recipe.yaml", redact(to_yaml(recipe)).encode())
    write_json(folder / "ds_config.json", deepspeed_config(recipe, ranks.size))
    write_json(folder / KERNELS_FILE, kernels)
    write_json(folder / "environment.json", {**_environment(ranks), "dataset": dataset, "hosts": table})


def _environment(ranks: Ranks) -> dict[str, Any]:
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.processor() or "cpu"
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "ranks": ranks.size,
        "device": device,
        "host": platform.node(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "versions": versions(VERSIONS),
    }


def _greeting(engine: Engine, folder: Path, progress: Progress, stage: Stage, ranks: Ranks) -> str:
    recipe = stage.recipe
    trainable = sum(math.prod(full_shape(p)) for p in engine.trainable().values())
    # By their files: not all of them are parameters of the model that the engine knows.
    frozen = sum(math.prod(files.shape(name) or ()) for files, names in stage.frozen() for name in names)
    begin = f"continues at step {progress.step}" if progress.step else "begins"
    return (
        f"{recipe.name} {begin} in {folder}: {trainable:,} trainable and {frozen:,} frozen parameters,"
        f" {ranks.size} ranks x {recipe.micro_batch} x {recipe.accumulation(ranks.size)} = {recipe.global_batch}"
        f" samples a step, {recipe.steps} steps, {recipe.precision} on {ranks.device.type}"
    )
