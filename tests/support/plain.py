"""Reference for ZeRO-3: the same recipe with its optimizer's library in one process, on the full batch at once."""

from __future__ import annotations

from typing import Any

import torch

import opened
from bifrost.data import Loader, LoaderSettings, Share
from bifrost.recipes import Recipe
from bifrost.recipes.schema import Optimizer
from bifrost.trainer.distributed.process_group import Ranks
from bifrost.trainer.optim.lr_schedule import learning_rate
from bifrost.trainer.optim.optimizers import parameter_groups
from bifrost.trainer.stages import StageModel
from bifrost.trainer.training.latent_statistics import measure_statistics
from bifrost.trainer.versions import import_hidden


def loaded(recipe: Recipe) -> tuple[Any, StageModel]:
    """The recipe's inputs, and its model with its first weights."""
    inputs = opened.inputs(recipe)
    model = inputs.stage.build()
    inputs.stage.load(model)
    measure_statistics(model, inputs, Ranks(0, 1, torch.device("cpu")))
    return inputs, model


def batches(recipe: Recipe, inputs: Any) -> Loader:
    """The whole batch of every step."""
    return Loader(
        inputs.dataset,
        inputs.plan,
        inputs.stage.collate(inputs.dataset),
        Share(0, 1, recipe.global_batch, recipe.global_batch),
        range(recipe.steps),
        LoaderSettings(inputs.stage.image_sizes, buckets=inputs.buckets),
    )


class Eager:
    """torchao's 8-bit AdamW without torch.compile, with the rate of each group as a number."""

    def __init__(self, groups: list[dict[str, Any]], settings: Optimizer) -> None:
        adamw: Any = import_hidden("torchao.optim").AdamW8bit
        self.optimizer = adamw(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
        self.param_groups: list[dict[str, Any]] = [{} for _ in self.optimizer.param_groups]
        self.zero_grad = self.optimizer.zero_grad

    def step(self) -> None:
        for own, group in zip(self.param_groups, self.optimizer.param_groups, strict=True):
            group["lr"].fill_(own["lr"])
        with torch.compiler.set_stance("force_eager"):
            self.optimizer.step()


def library(settings: Optimizer, model: StageModel) -> list[Any]:
    """The optimizers as their libraries' users would write them."""
    groups = parameter_groups(model, settings)
    if settings.name == "lion":
        from lion_pytorch import Lion

        return [Lion(groups, lr=settings.lr, betas=settings.betas)]
    if settings.name == "adamw-8bit":
        return [Eager(groups, settings)]
    muon: list[torch.optim.Optimizer] = []
    if settings.name == "muon":
        matrices = groups.pop(0)["params"]
        decay, momentum = settings.weight_decay, settings.momentum
        muon = [torch.optim.Muon(matrices, weight_decay=decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")]
    return [*muon, torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, fused=True)]


def losses(recipe: Recipe) -> list[float]:
    """The loss of every step."""
    inputs, model = loaded(recipe)
    optimizers = library(recipe.optimizer, model)
    losses = []
    for step, batch in enumerate(batches(recipe, inputs)):
        loss = model(**batch.arrays, normalizer=inputs.normalizer(step, 1)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.trainable().values(), recipe.optimizer.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe.optimizer, recipe.steps, step)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses
