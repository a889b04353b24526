"""Run folders without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bifrost.recipes import Recipe
from bifrost.trainer.checkpoint.shard import Payload
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.stages import open_stage


def save(folder: Path, recipe: Recipe, seed: int, slots: Sequence[str] = ("master",)) -> Path:
    """A run folder as left by training at step 7, with random weights in place of zero-initialised ones, others in
    each of `slots`, and random statistics."""
    stage = open_stage(recipe)
    model = stage.build()
    stage.load(model)
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for slot in slots:  # the last slot's weights stay in the model
        with torch.no_grad():
            for parameter in model.trainable().values():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
        tensors[slot] = {name: p.detach().flatten().clone() for name, p in model.trainable().items()}
    buffers = {name: torch.rand(b.shape, generator=draw).add(0.5).to(b.dtype) for name, b in model.statistics().items()}
    shapes = {name: tuple(p.shape) for name, p in model.trainable().items()}
    Store(folder / "checkpoints").save(
        7, Payload(0, 1, tensors, shapes, {"recipe": recipe.model_dump(mode="json")}, buffers)
    )
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return folder
