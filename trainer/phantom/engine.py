"""Counts of the engine's steps on one of N ranks: what it holds, its peak, where the host waits.

DeepSpeed runs as it is, on its CUDA accelerator and a process group whose collectives move nothing.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from ...recipes import Recipe
from ..distributed.process_group import Ranks
from ..errors import RunError
from ..optim.deepspeed_config import deepspeed_config
from ..optim.ema import Ema
from ..optim.engine import Engine, partitioned
from .mode import Phantom
from .passes import wrong_buffers
from .recipe import DEVICE, open_placed, random_batch

STEPS = 2
"""In the first one DeepSpeed learns the order of the layers."""


@dataclass(frozen=True)
class EngineCounts:
    """Of one rank. held: bytes between steps. peak: bytes at the peak of the last step. reads, copies, wrong: as in
    `PassCounts`, of the last step. applied: whether every step updated the weights."""

    held: int
    peak: int
    reads: dict[str, int]
    copies: dict[str, int]
    wrong: list[str]
    applied: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def count_engine(recipe: Recipe, ranks: int, text_tokens: int) -> EngineCounts:
    """Count steps of one pass on the first of `ranks` ranks. text_tokens: of every prompt of stage 1. RunError names
    what of the recipe cannot be counted."""
    recipe = recipe.model_copy(update={"global_batch": ranks * recipe.micro_batch})
    _require_no_offload(recipe)
    mode = Phantom()
    _join(ranks)
    config = deepspeed_config(recipe.split(ranks), recipe.precision, recipe.zero, recipe.optimizer.clip)
    with mode:
        stage = open_placed(recipe, placed=True)
        with partitioned(config, DEVICE):
            model: Any = stage.build(recipe.activation_checkpointing)
        model.build_rest()
        engine = Engine(model, recipe.optimizer, config, Ranks(0, ranks, DEVICE))
        average = Ema(engine.masters(), recipe.ema.decay, model.statistics()) if recipe.ema else None
        batch = random_batch(stage, recipe.micro_batch, text_tokens)
        applied = True
        for _ in range(STEPS):
            mode.restart()
            losses = engine.forward(batch)
            engine.backward(losses.loss)
            del losses
            engine.grad_norm()
            applied &= engine.step(recipe.optimizer.lr, skip=False)
            if average:
                average.update(engine.masters(), model.statistics())
        held = mode.memory.live - sum(x.untyped_storage().nbytes() for x in batch.values() if hasattr(x, "device"))
    return EngineCounts(held, mode.memory.peak, dict(mode.reads), dict(mode.copies), wrong_buffers(model), applied)


def _require_no_offload(recipe: Recipe) -> None:
    """RunError if a part is offloaded: its weights change their device, which fake tensors cannot."""
    places = {"backbone.placement": recipe.backbone.placement}
    if recipe.flux:
        places |= {f"flux.placement.{part}": place for part, place in recipe.flux.placement.model_dump().items()}
    for key, place in places.items():
        if place == "offloaded":
            raise RunError(f"{key}=offloaded: the phantom GPU counts no offloaded parts; check it with {key}=cached")


def _join(ranks: int) -> None:
    """A process group of `ranks` ranks in which collectives do nothing; this is the first."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks))  # read by DeepSpeed
    fake = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=ranks)
    # Compares lists of the ranks through collectives, whose results are not values here.
    coordinator: Any = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    coordinator.assert_ints_same_as_other_ranks = lambda ints: None
