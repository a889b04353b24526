"""Builds the components of the training loop from an open run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ...data import BadSamples, Batch, Loader, LoaderSettings, MixedDataset, Share
from ...data.bucketed_plan import BucketedPlan
from ...data.buckets import open_buckets
from ...data.mixture import MixedPlan
from ...slurm.exit_record import grace, stop_s
from ..checkpoint.manager import CheckpointManager
from ..checkpoint.state import capture, capture_statistics, refresh, restore
from ..distributed.stop_signals import TRAINING
from ..monitors.rank_stats import RankStats
from ..monitors.source_stats import SourceStats
from ..monitors.stragglers import Stragglers
from ..monitors.truncation import TruncationNotice
from ..monitors.utilisation import TEXTS, Utilisation
from ..optim.ema import Ema
from ..optim.engine import Engine, require_quantizer
from ..optim.lr_schedule import learning_rate
from ..optim.optimizers import require_optimizer
from ..optim.train_state import TrainState
from ..planner import parts, workload
from ..planner.devices import this_device
from ..stages.patch_latents import PatchLatentStage
from .base_loss import BaseLoss, open_text_sources
from .components import TrainerComponents
from .inputs import Inputs
from .latent_statistics import measure_statistics
from .mixture import to_json
from .model import build_model
from .resume_point import ResumePoint, find_resume_point, older_resume_point
from .rollback import Recovery
from .run_context import RunContext
from .run_record import RunRecord, open_record
from .validation import Spread, Validator


def build(run: RunContext, after_step: Callable[[TrainState], None]) -> TrainerComponents:
    """Model, engine, checkpoints, data and monitors of a run, at the point where it continues.
    after_step: called at the end of every step, on every rank.

    Nothing of an earlier attempt is overwritten before all checks have passed.
    """
    ranks, recipe = run.ranks, run.recipe
    point = find_resume_point(run)
    kernels = ranks.agreed(lambda: _choose_kernels(run))
    engine, ema, point = _engine(run, point)
    inputs = point.inputs
    run = replace(run, inputs=inputs)
    run.phases.step = point.progress.step
    validator, base_loss = ranks.agreed(lambda: (_validator(run, engine, ema), _base_loss(run, engine)))
    preview = ranks.agreed(lambda: _previews(run, engine))
    record = open_record(run, point, engine, kernels)
    saver = _saver(run, point, record, engine, ema)
    run.stop.phase = TRAINING
    if ranks.first:
        run.stop.announce()
    loaders = ExitStack()

    def batches(progress: TrainState) -> Iterator[Batch]:
        loaders.close()
        return iter(loaders.enter_context(closing(_loader(run, progress))))

    passes = ranks.size * run.batch.passes
    return TrainerComponents(
        steps=recipe.steps,
        log_every=recipe.log_every,
        batch=run.batch,
        health=recipe.health,
        learning_rate=partial(learning_rate, recipe.optimizer, recipe.steps),
        bad_samples=BadSamples(recipe.data.max_bad_fraction),
        stage=inputs.stage,
        sources=_source_stats(inputs, recipe.global_batch / passes),
        ranks=ranks,
        progress=point.progress,
        engine=engine,
        ema=ema,
        batches=batches,
        normalizer=lambda batch: inputs.normalizer(batch, passes),
        save=_save(point, record, saver, engine, ema),
        saver=saver,
        validator=validator,
        base_loss=base_loss,
        patience=recipe.validation.patience,
        recover=Recovery(recipe.health, saver, engine, ema, ranks, record.metrics, record.console),
        metrics=record.metrics,
        console=record.console,
        stop=run.stop,
        phases=run.phases,
        rank_stats=RankStats(ranks, Stragglers(ranks, run.hosts, record.metrics.write)),
        truncation=TruncationNotice(inputs.stage.text_limit, record.metrics.write, record.console.say),
        utilisation=_utilisation(run),
        after_step=_in_turn(preview, after_step),
        loaders=loaders,
        mirror=record.mirror,
        uploads=record.uploads,
    )


def _in_turn(*calls: Callable[[TrainState], None]) -> Callable[[TrainState], None]:
    def call_each(progress: TrainState) -> None:
        for call in calls:
            call(progress)

    return call_each


def _choose_kernels(run: RunContext) -> dict[str, dict[str, Any]]:
    """Select the stage's kernels; returns the record for `kernels.json`."""
    recipe, batch = run.recipe, run.batch
    return run.inputs.stage.choose_kernels(recipe.kernels, batch.micro_batch, recipe.precision, run.ranks, run.folder)


def _engine(run: RunContext, point: ResumePoint) -> tuple[Engine, Ema | None, ResumePoint]:
    """The model under ZeRO-3 and its EMA, with the state of the checkpoint at `point`, or of an older one if it is
    found damaged only now; and the point where the run continues."""
    recipe, ranks = run.recipe, run.ranks
    ranks.agreed(lambda: require_optimizer(recipe.optimizer))
    ranks.agreed(lambda: require_quantizer(recipe.zero, ranks.device))
    engine = Engine(build_model(run, new=point.reader is None), recipe.optimizer, run.deepspeed, ranks)
    if point.reader is None and not recipe.init_from:
        engine.undisturbed(lambda: measure_statistics(engine.model, run.inputs, ranks))
    ema = Ema(engine.masters(), recipe.ema.decay, engine.model.statistics()) if recipe.ema else None
    refused: set[int] = set()
    while reader := point.reader:
        found = partial(restore, engine, ema, reader, reader.state["updates"])
        problems = ranks.agreed(lambda found=found: [each for each in ranks.gather(found()) if each])
        if not problems:
            refresh(engine)
            break
        point.store.refuse(reader.step, problems, ranks.rank)
        refused.add(reader.step)
        point = older_resume_point(run, point, refused)
    return engine, ema, point


def _previews(run: RunContext, engine: Engine) -> Callable[[TrainState], None]:
    """A function to call after each step."""
    inputs, settings = run.inputs, run.recipe.previews
    if settings.every is None:
        return lambda progress: None
    from .preview import sampler  # imports diffusers

    return sampler(settings, settings.every, inputs.stage, engine, inputs.dataset, run.ranks, run.folder, run.phases)


def _saver(
    run: RunContext, point: ResumePoint, record: RunRecord, engine: Engine, ema: Ema | None
) -> CheckpointManager:
    """The checkpoint manager; also sets how long before the job's time limit the run must stop to save once more."""
    ranks = run.ranks
    saver = CheckpointManager(
        point.store,
        run.recipe.checkpoint,
        capture(engine, ema)[0],
        record.metrics.write,
        ranks.background_group(),
        point.local,
        nodes=len(set(run.hosts)),
        every=point.reader.state.get("save_every") if point.reader else None,
    )
    if ranks.first:
        guess, phases = grace(run.folder), run.phases
        run.stop.end_before(
            run.ends_at, lambda: stop_s(phases.median_step(), list(saver.seconds), phases.longest_between) or guess
        )
    return saver


def _save(
    point: ResumePoint, record: RunRecord, saver: CheckpointManager, engine: Engine, ema: Ema | None
) -> Callable[[TrainState], None]:
    """The loop's `save`."""
    inputs = point.inputs
    mixture = {"mixture": to_json(inputs.segments)} if inputs.segments else {}

    def save(progress: TrainState) -> None:
        state = {
            "progress": asdict(progress),
            "updates": engine.updates,
            "recipe": record.settings,
            "backbone": point.frozen_hash,
            "data": inputs.dataset.fingerprint,
            **mixture,
            "save_every": saver.every,
        }
        # No pruning during a streak of bad steps: a rollback may need the last checkpoint before them.
        prune = not progress.bad_in_a_row
        saver.save(
            progress.step, *capture(engine, ema), state, capture_statistics(engine, ema), prune, progress.best_step
        )

    return save


def _validator(run: RunContext, engine: Engine, ema: Ema | None) -> Validator | None:
    stage, recipe = run.inputs.stage, run.recipe
    if run.held_out is None:
        return None
    collates = stage.validation_collates(run.held_out.shards, run.ranks)
    rule, ranks = stage.bucket_rule, run.ranks
    buckets = open_buckets(run.held_out, rule, ranks.rank, ranks.gather) if rule else None
    held_out = Spread(run.held_out, buckets)
    return Validator(recipe.validation, recipe.micro_batch, stage, collates, held_out, engine, ema, ranks)


def _base_loss(run: RunContext, engine: Engine) -> BaseLoss | None:
    recipe, ranks, stage = run.recipe, run.ranks, run.inputs.stage
    if not (sources := open_text_sources(recipe.data, recipe.seed, ranks)):
        return None
    assert isinstance(stage, PatchLatentStage), "the schema refuses them in stage 2"
    # One process per source: they are few batches.
    settings = replace(_loader_settings(run), workers=min(1, recipe.data.workers), buckets=None)
    return BaseLoss(sources, stage.text_collate(), engine, ranks, _share(run), settings, recipe.steps)


def _source_stats(inputs: Inputs, scale: float) -> SourceStats | None:
    """Of a mixture. scale: see `SourceStats`."""
    if not isinstance(inputs.dataset, MixedDataset):
        return None
    assert isinstance(inputs.plan, (MixedPlan, BucketedPlan))
    records = {source.fingerprint: source for source in inputs.segments[-1].sources}
    numbers = [records[part.fingerprint].number for part in inputs.dataset.parts]
    sizes = [records[part.fingerprint].samples or len(part) for part in inputs.dataset.parts]
    return SourceStats(inputs.dataset.names, numbers, sizes, inputs.plan.taken, scale)


def _loader(run: RunContext, progress: TrainState) -> Loader:
    inputs, recipe = run.inputs, run.recipe
    return Loader(
        inputs.dataset,
        inputs.plan,
        inputs.stage.collate(inputs.dataset),
        _share(run),
        range(progress.batch, progress.batch + recipe.steps - progress.step),
        _loader_settings(run),
    )


def _share(run: RunContext) -> Share:
    return Share(run.ranks.rank, run.ranks.size, run.batch.global_batch, run.batch.micro_batch)


def _loader_settings(run: RunContext) -> LoaderSettings:
    data, inputs = run.recipe.data, run.inputs
    pinned = run.ranks.device.type == "cuda"
    return LoaderSettings(inputs.stage.image_sizes, data.workers, data.prefetch, pinned, inputs.buckets)


def _utilisation(run: RunContext) -> Utilisation:
    stage = run.inputs.stage
    plan = run.inputs.plan
    shares = plan.shares if isinstance(plan, BucketedPlan) else None
    patches = 0.0
    if isinstance(stage, PatchLatentStage):
        every = [math.prod(grid) * stage.branch.draws for grid in stage.grids]
        patches = sum(share * count for share, count in zip(shares or [1], every, strict=True))
    counted = [parts(run.recipe, text, shares=shares) for text in TEXTS]
    node = run.hosts.count(run.hosts[0])
    return Utilisation(counted, workload(run.recipe), run.ranks.size, node, patches, this_device())
