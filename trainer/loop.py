"""The step loop, top to bottom. It sequences; every concern lives in a file of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..data import BadSamples, Batch
from ..recipes import Recipe
from .checkpoint.saver import Saver
from .ema import Ema
from .engine import Engine
from .monitors.console import Console
from .monitors.health import Health
from .monitors.meter import Meter
from .monitors.metrics import MetricsFile
from .monitors.sections import Sections
from .monitors.stop import StopSignals
from .monitors.stragglers import Stragglers
from .ranks import Ranks
from .schedule import learning_rate
from .sequence import SequenceDigest
from .stages import Stage


@dataclass
class Progress:
    """Where the run stands: what a checkpoint's JSON holds beside the tensors."""

    step: int = 0
    """Steps done, skipped ones included."""
    samples: int = 0
    """Samples consumed in all."""
    skipped_steps: int = 0
    bad_in_a_row: int = 0
    digest: str = ""
    """Chain over every sample consumed so far; see `SequenceDigest`."""


@dataclass
class Parts:
    """Everything the loop calls."""

    recipe: Recipe
    stage: Stage
    ranks: Ranks
    engine: Engine
    ema: Ema | None
    batches: Iterator[Batch]
    normalizer: Callable[[int], float]
    """Step -> what its backward passes divide the summed loss by."""
    save: Callable[[Progress], None]
    """Begins to save; `saver` says when, and when it is done."""
    saver: Saver
    metrics: MetricsFile
    console: Console
    stop: StopSignals
    sections: Sections
    stragglers: Stragglers
    after_step: Callable[[Progress], None]
    """Called at the end of every step, on every rank."""


def run(parts: Parts, progress: Progress) -> bool:
    """Train from `progress` to the recipe's last step, updating it. Returns False when a signal ended it before.

    Raises Unhealthy after too many skipped steps, DataError for unreadable data.
    """
    recipe, ranks, engine, section = parts.recipe, parts.ranks, parts.engine, parts.sections
    accumulation = recipe.accumulation(ranks.size)
    health = Health(recipe.health.max_bad_steps, progress.skipped_steps, progress.bad_in_a_row)
    bad_samples = BadSamples(recipe.data.max_bad_share)
    sequence = SequenceDigest(progress.digest)
    meter = Meter(ranks.device)

    while progress.step < recipe.steps:
        step = progress.step
        normalizer = parts.normalizer(step)
        loss_sum, sums = torch.zeros((), device=ranks.device), torch.zeros(parts.stage.sums, device=ranks.device)
        keys: list[str] = []
        replaced: list[tuple[str, str]] = []
        for row in range(accumulation):
            with section("data"):
                batch = next(parts.batches)
            keys += batch.keys
            replaced += batch.replaced
            with section("forward"):
                losses = engine.forward(_on_device(batch, ranks) | {"normalizer": normalizer})
            with section("backward"):
                engine.backward(losses.loss)
            loss_sum = loss_sum + losses.loss.detach()
            sums = sums + losses.sums
            if row + 1 < accumulation:
                engine.after_pass()

        # One exchange a step settles all that the ranks must agree on.
        with section("exchange"):
            mine = [*torch.cat((loss_sum[None], sums)).tolist(), *sequence.fingerprint(keys), len(replaced)]
            loss_total, *totals, low, high, bad, stops = ranks.total([*mine, parts.stop.received is not None])
        loss = loss_total / (ranks.size * accumulation)
        lr = learning_rate(recipe, step)
        with section("optimizer"):
            result = engine.step(lr, finite=math.isfinite(loss))
            if result.applied and parts.ema is not None:
                parts.ema.update(engine.masters())

        progress.step += 1
        section.step_done(progress.step)
        progress.samples += recipe.global_batch
        progress.digest = sequence.advance(low, high)
        if not result.applied:
            parts.metrics.write({"event": "skipped", "step": progress.step, "loss": str(loss)})
        health.record(progress.step, result.applied, loss)
        progress.skipped_steps, progress.bad_in_a_row = health.skipped, health.in_a_row
        if bad:
            replaced = [pair for part in ranks.gather(replaced) for pair in part]
            parts.metrics.write({"event": "replaced", "step": progress.step, "samples": replaced})
        bad_samples.add(replaced if bad else [], recipe.global_batch)
        meter.count(recipe.global_batch, parts.stage.tokens(totals))

        last = progress.step == recipe.steps
        if last or progress.step % recipe.log_every == 0:
            times = section.take()
            record = {
                "step": progress.step,
                "samples": progress.samples,
                "loss": _finite(loss),
                **{name: _finite(value) for name, value in parts.stage.report(totals).items()},
                "grad_norm": _finite(result.grad_norm),
                "lr": lr,
                **meter.rates(times),
                **parts.stragglers.look(progress.step, times),
                "skipped_steps": progress.skipped_steps,
                "digest": progress.digest,
            }
            parts.metrics.write(record)
            parts.console.metrics(record)
        if last or stops or parts.saver.due(progress.step):
            with section("save"):
                parts.save(progress)
                if last or stops:
                    parts.saver.finish()
        parts.after_step(progress)
        if stops:
            return last
    return True


def _on_device(batch: Batch, ranks: Ranks) -> dict[str, Any]:
    return {
        name: value.to(ranks.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.arrays.items()
    }


def _finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None
