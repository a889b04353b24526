"""The step loop, top to bottom. It sequences; every concern lives in a file of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...data import BadSamples, Batch
from ...recipes import Recipe
from ..checkpoint.manager import Saver
from ..distributed.process_group import Ranks
from ..distributed.stop_signals import StopSignals
from ..monitors.console import Console
from ..monitors.health import Health, skipped_event
from ..monitors.meter import Meter
from ..monitors.metrics import MetricsFile, finite
from ..monitors.phase_timer import Sections
from ..monitors.rank_stats import Spread
from ..monitors.utilisation import Utilisation
from ..optim.ema import Ema
from ..optim.engine import Engine
from ..optim.lr_schedule import learning_rate
from ..optim.train_state import Progress
from ..stages import Stage
from .data_digest import SequenceDigest


@dataclass
class Parts:
    """Everything the loop calls."""

    recipe: Recipe
    stage: Stage
    ranks: Ranks
    engine: Engine
    ema: Ema | None
    batches: Callable[[Progress], Iterator[Batch]]
    """This rank's micro-batches from where the run stands to its end."""
    normalizer: Callable[[int], float]
    """Number of a global batch, from 0 -> what its backward passes divide the summed loss by."""
    save: Callable[[Progress], None]
    """Begins to save; `saver` says when, and when it is done."""
    saver: Saver
    recover: Callable[[Progress], None]
    """Called after too many skipped steps in a row: goes back to a checkpoint, or raises Unhealthy."""
    metrics: MetricsFile
    console: Console
    stop: StopSignals
    sections: Sections
    spread: Spread
    utilisation: Utilisation
    after_step: Callable[[Progress], None]
    """Called at the end of every step, on every rank."""


def run(parts: Parts, progress: Progress) -> bool:
    """Train from `progress` to the recipe's last step, updating it. Returns False when a signal ended it before.

    Raises Unhealthy when bad numbers do not end, DataError for unreadable data.
    """
    recipe, ranks, engine, section = parts.recipe, parts.ranks, parts.engine, parts.sections
    accumulation = recipe.accumulation(ranks.size)
    health = Health(recipe.health, progress)
    bad_samples = BadSamples(recipe.data.max_bad_share)
    meter = Meter()
    batches = parts.batches(progress)

    while health.exhausted or progress.step < recipe.steps:
        if health.exhausted:
            with section("rollback"):
                parts.recover(progress)
                batches = parts.batches(progress)
            continue
        step = progress.step
        normalizer = parts.normalizer(progress.batch)
        loss_sum, sums = torch.zeros((), device=ranks.device), torch.zeros(parts.stage.sums, device=ranks.device)
        keys: list[str] = []
        names: list[str] = []
        each: list[torch.Tensor] = []
        replaced: list[tuple[str, str]] = []
        for row in range(accumulation):
            with section("data"):
                batch = next(batches)
            keys += batch.keys
            names += batch.names
            replaced += batch.replaced
            with section("forward"):
                losses = engine.forward(_on_device(batch, ranks) | {"normalizer": normalizer})
            with section("backward"):
                engine.backward(losses.loss)
            loss_sum = loss_sum + losses.loss.detach()
            sums = sums + losses.sums
            each.append(losses.each)
            if row + 1 < accumulation:
                engine.after_pass()

        # One exchange a step settles all that the ranks must agree on.
        with section("exchange"):
            *mine, norm = torch.cat((loss_sum[None], sums, engine.grad_norm()[None])).tolist()
            mine += [norm**2, *SequenceDigest.fingerprint(names), len(replaced), parts.stop.asked() is not None]
            loss_total, *totals, norm_squared, low, high, bad, stops = ranks.total(mine)
        loss, grad_norm = loss_total / (ranks.size * accumulation), math.sqrt(norm_squared)
        reason = health.judge(loss, grad_norm)
        lr = learning_rate(recipe, step)
        with section("optimizer"):
            applied = engine.step(lr, skip=reason is not None)
            if applied and parts.ema is not None:
                parts.ema.update(engine.masters(), engine.model.statistics())
        if not applied and reason is None:  # DeepSpeed adds the squares of the ranks in fp32
            reason, grad_norm = "gradient norm is beyond fp32", math.inf

        progress.step += 1
        progress.batch += 1
        section.step_done(progress.step)
        progress.samples += recipe.global_batch
        progress.digest = SequenceDigest(progress.digest).advance(low, high)
        health.record(not applied, loss, grad_norm)
        if reason is not None:
            shares = ranks.gather((keys, torch.cat(each).tolist(), float(loss_sum)))
            parts.metrics.write(skipped_event(progress, reason, loss, grad_norm, shares))
            parts.console.say(f"step {progress.step:>6}  skipped: {reason}")
        if bad:
            replaced = [pair for part in ranks.gather(replaced) for pair in part]
            parts.metrics.write({"event": "replaced", "step": progress.step, "samples": replaced})
        bad_samples.add(replaced if bad else [], recipe.global_batch)
        meter.count(recipe.global_batch, parts.stage.tokens(totals))

        last = progress.step == recipe.steps
        if last or progress.step % recipe.log_every == 0:
            times = section.take()
            rates = meter.rates(times)
            record = {
                "step": progress.step,
                "batch": progress.batch,
                "samples": progress.samples,
                "loss": finite(loss),
                **{name: finite(value) for name, value in parts.stage.report(totals).items()},
                "grad_norm": finite(grad_norm),
                "lr": lr,
                **rates,
                **parts.utilisation.rates(rates["samples_per_s"], rates["tokens_per_s"], rates["step_s"]),
                **parts.spread.look(progress.step, times),
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
            return last and not health.exhausted
    return True


def _on_device(batch: Batch, ranks: Ranks) -> dict[str, Any]:
    return {
        name: value.to(ranks.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.arrays.items()
    }
