"""The latents of FLUX's VAE as targets, for comparison with the MLLM's own patch latents.

Legend: B images of S x S pixels, P their side for the VAE, c latent channels, N patches in raster order, F values of a
patch, D latent width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .flux import FluxFolder, FrozenFlux
from .pixel_targets import LinearTargets, by_patch


class VaeTargets(LinearTargets):
    """Orthonormal random functions of a patch's VAE latents, the means of the posterior.

    `encoder` is the VAE, which the owner of this module registers or not, and fills.
    """

    encoder: FrozenFlux

    def __init__(self, folder: FluxFolder, image_size: int, patches: int, width: int) -> None:
        """image_size: P. width: D. RunError unless the latents divide into the patches."""
        super().__init__("random", patches, folder.values_of_patch(image_size, math.isqrt(patches)), width)
        self.folder, self.image_size = folder, image_size

    def build(self) -> FrozenFlux:
        """The VAE, without weights."""
        return FrozenFlux(self.folder, ["vae"])

    @torch.no_grad()
    def values(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        size = (self.image_size, self.image_size)
        if images.shape[-1] != self.image_size:
            scaled = F.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True)
            images = scaled.round().clamp(0, 255).to(torch.uint8)
        return by_patch(self.encoder.encode_images(images), self.patches).to(dtype)
