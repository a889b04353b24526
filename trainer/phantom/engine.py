"""Counts of the engine's steps on one of N ranks: what it holds, its peak, where the host waits.

DeepSpeed runs as it is, on its CUDA accelerator and a process group whose collectives move nothing.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ...recipes import Recipe
from ..distributed.process_group import Ranks
from ..optim.deepspeed_config import deepspeed_config
from ..optim.ema import Ema
from ..optim.engine import Engine, partitioned, require_quantizer
from ..stages.controlnet import ControlNetStage
from .host_parts import host_parts
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


class FirstRank:
    """The first of `ranks` ranks that train a recipe, one pass per step. Opened and used within `mode`; a process can
    open several, of the same number of ranks.

    text_tokens: of every prompt of stage 1. RunError names what of the recipe cannot be used here.
    """

    def __init__(self, mode: Phantom, recipe: Recipe, ranks: int, text_tokens: int) -> None:
        recipe = recipe.model_copy(update={"global_batch": ranks * recipe.micro_batch})
        config = deepspeed_config(recipe.split(ranks), recipe.precision, recipe.zero, recipe.optimizer.clip)
        self.lr = recipe.optimizer.lr
        _join(ranks)
        require_quantizer(recipe.zero, DEVICE)
        stage = open_placed(recipe, placed=True)
        with partitioned(config, DEVICE):
            model: Any = stage.build(recipe.activation_checkpointing)
        with host_parts(mode):
            model.build_rest()
            if isinstance(stage, ControlNetStage):
                model.offload()
        self.engine = Engine(model, recipe.optimizer, config, Ranks(0, ranks, DEVICE))
        self.ema = Ema(self.engine.masters(), recipe.ema.decay, model.statistics()) if recipe.ema else None
        self.batch = random_batch(stage, recipe.micro_batch, text_tokens)

    def step(self) -> bool:
        """As the training loop does it; whether it updated the weights."""
        losses = self.engine.forward(self.batch)
        self.engine.backward(losses.loss)
        del losses
        self.engine.grad_norm()
        applied = self.engine.step(self.lr, skip=False)
        if self.ema:
            self.ema.update(self.engine.masters(), self.engine.model.statistics())
        return applied

    @property
    def batch_bytes(self) -> int:
        """Of the batch on the device."""
        return sum(x.untyped_storage().nbytes() for x in self.batch.values() if isinstance(x, Tensor))


def count_engine(recipe: Recipe, ranks: int, text_tokens: int) -> EngineCounts:
    """Count steps of one pass on the first of `ranks` ranks. text_tokens: of every prompt of stage 1. RunError names
    what of the recipe's folders cannot be used."""
    with Phantom() as mode:
        rank = FirstRank(mode, recipe, ranks, text_tokens)
        applied = True
        for _ in range(STEPS):
            mode.restart()
            applied &= rank.step()
        held = mode.memory.live - rank.batch_bytes
        wrong = wrong_buffers(rank.engine.model)
    return EngineCounts(held, mode.memory.peak, dict(mode.reads), dict(mode.copies), wrong, applied)


def _join(ranks: int) -> None:
    """A process group of `ranks` ranks in which collectives do nothing; this is the first."""
    if dist.is_initialized():
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks))  # read by DeepSpeed
    fake = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=ranks)
    # Compares lists of the ranks through collectives, whose results are not values here.
    coordinator: Any = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    coordinator.assert_ints_same_as_other_ranks = lambda ints: None
