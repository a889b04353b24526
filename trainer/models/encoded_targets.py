"""Latents of another encoder as targets, for comparison with the MLLM's own patch latents: FLUX's VAE, or the vision
encoder of another Qwen2.5-VL.

Legend: B images of S x S pixels, P their side for the VAE, c latent channels, N patches in raster order, F values of a
patch, D latent width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.attention import Backend
from .backbone import FrozenBackbone
from .flux import FluxFolder, FrozenFlux
from .pixel_targets import EncodedTargets, by_patch
from .weights import WeightFiles


class VaeTargets(EncodedTargets):
    """Of the latents of FLUX's VAE: the means of the posterior."""

    def __init__(self, folder: FluxFolder, image_size: int, patches: int, width: int) -> None:
        """image_size: P. width: D. RunError unless the latents divide into the patches."""
        super().__init__("random", patches, folder.values_of_patch(image_size, math.isqrt(patches)), width)
        self.folder, self.image_size = folder, image_size

    def build(self) -> FrozenFlux:
        return FrozenFlux(self.folder, ["vae"])

    def load(self) -> None:
        self.encoder.load()

    @torch.no_grad()
    def values(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        size = (self.image_size, self.image_size)
        if images.shape[-1] != self.image_size:
            scaled = F.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True)
            images = scaled.round().clamp(0, 255).to(torch.uint8)
        return by_patch(self.encoder.encode_images(images), self.patches).to(dtype)


class EncoderTargets(EncodedTargets):
    """Of the patch latents of another vision encoder, on the same grid."""

    def __init__(
        self, config: Any, files: WeightFiles | None, patches: int, width: int, attention: Backend = "sdpa"
    ) -> None:
        """config: the Qwen2_5_VLConfig of the encoder. files: its weights, which `load` needs. width: D."""
        super().__init__("random", patches, config.vision_config.out_hidden_size, width)
        self.config, self.files = config, files
        self.attention: Backend = attention

    def build(self) -> FrozenBackbone:
        return FrozenBackbone(self.config, vision_attention=self.attention, text=False)

    def load(self) -> None:
        assert self.files is not None
        self.encoder.load(self.files)

    def restore(self) -> None:
        self.encoder.restore_rotary()

    def values(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.encoder.patch_latents(images).to(dtype)
