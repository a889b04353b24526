"""Sizes of the caches of `bifrost data encode`, per sample."""

from __future__ import annotations

import math

from ..models.backbone_config import grid_side
from .opened import LatentControl, PatchLatents


def cached_bytes(model: PatchLatents | LatentControl, precision: str) -> dict[str, int]:
    """Kind of cache -> bytes of a sample's tensors, for the caches that the recipe of `model` reads. precision: `bf16`
    or `fp32`."""
    byte = 2 if precision == "bf16" else 4
    width = model.config.vision_config.out_hidden_size
    if isinstance(model, PatchLatents):
        latents = byte * grid_side(model.config, model.image_size) ** 2 * width
        return {"vision": latents} if model.backbone.vision_encoder == "cached" else {}
    folder, grid = model.folder, model.grids[0]  # caches of images are of squares
    latents = byte * math.prod(grid.latents) * width
    sizes = {
        "vae": byte * 2 * folder.vae["latent_channels"] * 4 * math.prod(grid.tokens),
        "text": byte * (folder.text_lengths[0] * folder.t5.d_model + folder.clip.hidden_size),
        "vision": latents,
    }
    kinds = [kind for kind in model.flux.placement.cached if kind != "vision" or model.latents != "predicted"]
    found = {str(kind): sizes[kind] for kind in kinds}
    return found if model.latents == "true" else {**found, "predicted": latents}
