"""Memory of stage 1's previews on rank 0's GPU: a FLUX and a ControlNet used only for previews."""

from __future__ import annotations

from pathlib import Path

from ...recipes import Recipe, load_recipe, with_new_names
from ...recipes.schema import Previews
from ..io import read_json
from ..models.flux_config import PARTS, FluxConfig
from ..models.hub import architecture
from . import flux_shapes
from .opened import LatentControl

WEIGHT_BYTES = 2
"""Previews are generated in bf16; weights in 8 bits stay so."""
STAND_IN = "flux-controlnet"
"""The recipe whose FLUX and ControlNet are counted if the recipe's own are not available."""


def image_generator_bytes(previews: Previews) -> float:
    """Bytes of the weights of the image generator for the previews of a stage-1 run; 0 without previews. Reads only
    configs."""
    if previews.every is None or previews.controlnet is None:
        return 0.0
    path = Path(previews.controlnet)
    own, exported = path / "recipe.yaml", read_json(path / "config.json") or {}
    if exported and "recipe" not in exported and not own.is_file() and previews.flux:
        from ..models.latent_controlnet import read_config  # imports torch: it opens the weights

        shape, _ = read_config(path)
        folder = FluxConfig.open(architecture(previews.flux, None, "previews.flux"))
    else:
        if "recipe" in exported:  # low-rank pairs
            other = Recipe.model_validate(with_new_names(exported["recipe"]))
        else:
            other = load_recipe(own if own.is_file() else STAND_IN, stored=True)
        assert other.flux is not None, "required by the recipe schema"
        flux = other.flux
        if previews.flux:
            flux = flux.model_copy(update={"path": previews.flux, "revision": None})
        stage = LatentControl.open(other.backbone, flux, other.controlnet, other.data)
        shape, folder = stage.shape, stage.folder
    weights = [flux_shapes.bridge(shape), *(flux_shapes.flux_part(folder, part) for part in PARTS)]
    return float(sum((weight.width or WEIGHT_BYTES) * weight.size for part in weights for weight in part))
