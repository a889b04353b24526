"""The step loop, top to bottom. It sequences; every concern has a file of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...data import Batch
from ..monitors.health import Health, skipped_event
from ..monitors.meter import Meter
from ..monitors.metrics import finite
from ..optim.train_state import TrainState
from .components import TrainerComponents
from .data_digest import SequenceDigest
from .transfer import on_device


def run(parts: TrainerComponents, progress: TrainState) -> bool:
    """Train from `progress` to the last step, updating it. Returns False when a stop signal ended it early.

    Raises Unhealthy when steps stay bad, DataError for unreadable data.
    """
    phase, global_batch = parts.phases, parts.batch.global_batch
    health = Health(parts.health, progress)
    meter = Meter()
    batches = parts.batches(progress)

    while health.exhausted or not progress.done(parts.steps, parts.patience):
        if health.exhausted:
            with phase("rollback"):
                parts.recover(progress)
                if parts.sources:
                    parts.sources.reset()
                batches = parts.batches(progress)
            continue
        mine = _accumulate(parts, progress, batches)
        total = _exchange(parts, mine)
        reason = health.judge(total.loss, total.grad_norm)
        lr = parts.learning_rate(progress.step)
        applied = _update(parts, lr, skip=reason is not None)
        if not applied and reason is None:  # DeepSpeed sums the ranks' squares in fp32
            reason, total = "gradient norm is beyond fp32", total._replace(grad_norm=math.inf)

        if parts.sources:
            parts.sources.add(progress, total.sources, skipped=not applied)
        progress.step += 1
        progress.batch += 1
        phase.step_done(progress.step)
        progress.samples += global_batch
        progress.digest = SequenceDigest(progress.digest).advance(*total.names)
        health.record(not applied, total.loss, total.grad_norm)
        if reason is not None:
            _report_skip(parts, progress, reason, mine, total)
        parts.bad_samples.add(_report_replaced(parts, progress, mine.replaced) if total.replaced else [], global_batch)
        parts.truncation.add(progress.step, parts.stage.report(total.sums), global_batch)
        meter.count(global_batch, parts.stage.tokens(total.sums))

        measured = _measure_base_loss(parts, progress) | ({} if total.stops else _validate(parts, progress))
        last = progress.done(parts.steps, parts.patience)
        if last or measured or progress.step % parts.log_every == 0:
            _log(parts, progress, total, lr, meter, measured)
        if last or total.stops or parts.saver.due(progress.step, best=progress.best_step == progress.step):
            with phase("save"):
                parts.save(progress)
                if last or total.stops:
                    parts.saver.finish()
        parts.after_step(progress)
        if total.stops:
            return last and not health.exhausted
    return True


@dataclass
class _Share:
    """Sums over one rank's micro-batches of a step: loss [], sums [Stage.sums], and each sample's loss [B]."""

    loss: Tensor
    sums: Tensor
    each: list[Tensor] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    replaced: list[tuple[str, str]] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    replaced_sources: list[int] = field(default_factory=list)


class _Total(NamedTuple):
    """Sums of a step over all ranks. names: samples' fingerprint; replaced: samples; stops: ranks asked to stop;
    sources: `SourceStats.sums`, of a mixture."""

    loss: float
    grad_norm: float
    sums: list[float]
    names: tuple[float, float]
    replaced: float
    stops: float
    sources: list[float]


def _accumulate(parts: TrainerComponents, progress: TrainState, batches: Iterator[Batch]) -> _Share:
    """The forward and backward passes of a step."""
    ranks, engine, phase = parts.ranks, parts.engine, parts.phases
    passes, normalizer = parts.batch.passes, parts.normalizer(progress.batch)
    mine = _Share(torch.zeros((), device=ranks.device), torch.zeros(parts.stage.sums, device=ranks.device))
    for number in range(passes):
        with phase("data"):
            batch = next(batches)
        mine.keys += batch.keys
        mine.names += batch.names
        mine.replaced += batch.replaced
        mine.sources += batch.sources
        mine.replaced_sources += batch.replaced_sources
        with phase("forward"):
            losses = engine.forward(on_device(batch, ranks.device) | {"normalizer": normalizer})
        with phase("backward"):
            engine.backward(losses.loss)
        mine.loss = mine.loss + losses.loss.detach()
        mine.sums = mine.sums + losses.sums
        mine.each.append(losses.each)
        if number + 1 < passes:
            engine.after_pass()
    return mine


def _exchange(parts: TrainerComponents, mine: _Share) -> _Total:
    """The step's only exchange: everything that the ranks must agree on, in one all-reduce."""
    ranks, engine, sources = parts.ranks, parts.engine, parts.sources
    with parts.phases("exchange"):
        each = mine.each if sources else []
        found = torch.cat((mine.loss[None], mine.sums, engine.grad_norm()[None], *each)).tolist()
        own = 1 + parts.stage.sums
        values, norm, losses = found[:own], found[own], found[own + 1 :]
        values += [norm**2, *SequenceDigest.fingerprint(mine.names), len(mine.replaced), parts.stop.asked() is not None]
        values += sources.sums(losses, mine.sources, mine.replaced_sources) if sources else []
        loss, *rest = ranks.total(values)
    sums, (norm_squared, low, high, replaced, stops, *of_sources) = rest[: own - 1], rest[own - 1 :]
    passes = ranks.size * parts.batch.passes
    return _Total(loss / passes, math.sqrt(norm_squared), sums, (low, high), replaced, stops, of_sources)


def _update(parts: TrainerComponents, lr: float, skip: bool) -> bool:
    """Update weights and EMA; returns whether the step was applied."""
    if parts.saver.copying:
        with parts.phases("save"):
            parts.saver.await_copy()
    with parts.phases("optimizer"):
        applied = parts.engine.step(lr, skip)
        if applied and parts.ema is not None:
            parts.ema.update(parts.engine.masters(), parts.engine.model.statistics())
    return applied


def _report_skip(parts: TrainerComponents, progress: TrainState, reason: str, mine: _Share, total: _Total) -> None:
    shares = parts.ranks.gather((mine.keys, torch.cat(mine.each).tolist(), float(mine.loss)))
    parts.metrics.write(skipped_event(progress, reason, total.loss, total.grad_norm, shares))
    parts.console.say(f"step {progress.step:>6}  skipped: {reason}")


def _report_replaced(
    parts: TrainerComponents, progress: TrainState, mine: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The samples that some rank could not read, and the reasons. mine: of this rank."""
    replaced = [pair for share in parts.ranks.gather(mine) for pair in share]
    parts.metrics.write({"event": "bad_samples", "step": progress.step, "samples": replaced})
    return replaced


def _measure_base_loss(parts: TrainerComponents, progress: TrainState) -> dict[str, float | None]:
    """The frozen base's losses on the understanding sources that are read after this step. Also when a stop is asked
    for: the next attempt begins with the next step."""
    if parts.base_loss is None or not parts.base_loss.due(progress.step):
        return {}
    with parts.phases("base_loss"):
        found = parts.base_loss.measure(progress.step)
    parts.bad_samples.add(_report_replaced(parts, progress, found.replaced) if found.unreadable else [], found.samples)
    return found.metrics


def _validate(parts: TrainerComponents, progress: TrainState) -> dict[str, float | None]:
    """The held-out metrics of this step; empty if none are due."""
    step, validator = progress.step, parts.validator
    if validator is None or not (validator.due(step) or step == parts.steps):
        return {}
    with parts.phases("validation"):
        return validator.measure(progress)


def _log(
    parts: TrainerComponents,
    progress: TrainState,
    total: _Total,
    lr: float,
    meter: Meter,
    measured: dict[str, float | None],
) -> None:
    """Write the metric line of a step, with what was measured after it; every rank calls it."""
    times = parts.phases.take()
    rates = meter.rates(times)
    record = {
        "step": progress.step,
        "batch": progress.batch,
        "samples": progress.samples,
        "loss": finite(total.loss),
        **{name: finite(value) for name, value in parts.stage.report(total.sums).items()},
        **measured,
        "grad_norm": finite(total.grad_norm),
        "lr": lr,
        **rates,
        **parts.utilisation.rates(rates["samples_per_s"], rates["tokens_per_s"], rates["step_s"]),
        **parts.rank_stats.collect(progress.step, times),
        **(parts.sources.report(progress) if parts.sources else {}),
        "skipped_steps": progress.skipped_steps,
        "data_digest": progress.digest,
    }
    parts.metrics.write(record)
    parts.console.metrics(record)
