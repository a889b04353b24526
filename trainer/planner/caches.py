"""Sizes of the caches of `bifrost data encode`, per sample."""

from __future__ import annotations

import math

from .opened import LatentControl, PatchLatents


def cached_bytes(model: PatchLatents | LatentControl, precision: str) -> dict[str, int]:
    """Kind of cache -> bytes of a sample's tensors, in the largest bucket, for the caches that the recipe of `model`
    reads. precision: `bf16` or `fp32`."""
    byte = 2 if precision == "bf16" else 4
    width = model.config.vision_config.out_hidden_size
    latents = byte * max(math.prod(grid.latents) for grid in model.grids) * width
    if isinstance(model, PatchLatents):
        return {"vision": latents} if model.backbone.vision_encoder == "cached" else {}
    folder, tokens = model.folder, max(math.prod(grid.tokens) for grid in model.grids)
    sizes = {
        "vae": byte * 2 * folder.vae["latent_channels"] * 4 * tokens,
        "text": byte * (folder.text_lengths[0] * folder.t5.d_model + folder.clip.hidden_size),
        "vision": latents,
    }
    kinds = [kind for kind in model.flux.placement.cached if kind != "vision" or model.latents != "predicted"]
    found = {str(kind): sizes[kind] for kind in kinds}
    return found if model.latents == "true" else {**found, "predicted": latents}
