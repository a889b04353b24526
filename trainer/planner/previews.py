"""What stage 1's previews need on rank 0's GPU: a FLUX and a ControlNet, which are there for the preview alone."""

from __future__ import annotations

from pathlib import Path

import torch

from ...recipes import Recipe, load_recipe
from ..models import latent_controlnet
from ..models.flux import PARTS, FluxFolder
from ..models.hub import architecture
from ..models.latent_controlnet import LatentControlNet
from ..stages.controlnet import ControlNetStage

WEIGHT_BYTES = 2
"""Previews are painted in bf16."""
STAND_IN = "flux-controlnet"
"""The recipe whose FLUX and ControlNet are counted where those of the recipe are not here."""


def image_generator_bytes(recipe: Recipe) -> float:
    """Bytes of the weights that paint a stage-1 preview; 0 for a recipe without previews, and in stage 2, whose model
    paints by itself. Only configurations are read."""
    previews = recipe.previews
    if recipe.stage != "patch-latents" or previews.every is None or previews.controlnet is None:
        return 0.0
    path = Path(previews.controlnet)
    if (path / "config.json").is_file() and not (path / "recipe.yaml").is_file() and previews.flux:
        shape, _ = latent_controlnet.read_config(path)
        folder = FluxFolder.open(architecture(previews.flux, None, "previews.flux"), for_counting=True)
    else:
        own = path / "recipe.yaml"
        painter = load_recipe(own if own.is_file() else STAND_IN, stored=True)
        if previews.flux and painter.flux:
            flux = painter.flux.model_copy(update={"path": previews.flux, "revision": None})
            painter = painter.model_copy(update={"flux": flux})
        stage = ControlNetStage.open(painter, for_counting=True)
        shape, folder = stage.shape, stage.folder
    with torch.device("meta"):
        modules = [LatentControlNet(shape), *(folder.build(part) for part in PARTS)]
    return float(WEIGHT_BYTES * sum(p.numel() for module in modules for p in module.parameters()))
