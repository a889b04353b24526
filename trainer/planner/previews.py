"""Memory of stage 1's previews on rank 0's GPU: a FLUX and a ControlNet used only for previews."""

from __future__ import annotations

from pathlib import Path

import torch

from ...recipes import load_recipe
from ...recipes.schema import Previews
from ..models import latent_controlnet
from ..models.flux import PARTS, FluxFolder
from ..models.hub import architecture
from ..models.latent_controlnet import LatentControlNet
from ..stages import open_controlnet

WEIGHT_BYTES = 2
"""Previews are generated in bf16."""
STAND_IN = "flux-controlnet"
"""The recipe whose FLUX and ControlNet are counted if the recipe's own are not available."""


def image_generator_bytes(previews: Previews) -> float:
    """Bytes of the weights of the image generator for the previews of a stage-1 run; 0 without previews. Reads only
    configs."""
    if previews.every is None or previews.controlnet is None:
        return 0.0
    path = Path(previews.controlnet)
    if (path / "config.json").is_file() and not (path / "recipe.yaml").is_file() and previews.flux:
        shape, _ = latent_controlnet.read_config(path)
        folder = FluxFolder.open(architecture(previews.flux, None, "previews.flux"), for_counting=True)
    else:
        own = path / "recipe.yaml"
        generator_recipe = load_recipe(own if own.is_file() else STAND_IN, stored=True)
        if previews.flux and generator_recipe.flux:
            flux = generator_recipe.flux.model_copy(update={"path": previews.flux, "revision": None})
            generator_recipe = generator_recipe.model_copy(update={"flux": flux})
        stage = open_controlnet(generator_recipe, for_counting=True)
        shape, folder = stage.shape, stage.folder
    with torch.device("meta"):
        modules = [LatentControlNet(shape), *(folder.build(part) for part in PARTS)]
    return float(WEIGHT_BYTES * sum(p.numel() for module in modules for p in module.parameters()))
