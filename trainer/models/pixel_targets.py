"""Other targets than the MLLM's own patch latents, for comparison: linear functions of each patch's pixels.

Legend: B images of S x S pixels, N patches in raster order, F = 3 S^2 / N values of a patch's pixels, D latent width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .buffers import Fp32Buffers


def patch_pixels(images: Tensor, patches: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels 0 .. 1 of every patch, [B, N, F], of uint8 images [B, 3, S, S]."""
    samples, channels, size, _ = images.shape
    side = math.isqrt(patches)
    tiles = images.to(dtype).div(255).view(samples, channels, side, size // side, side, size // side)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(samples, patches, -1)


class PixelTargets(Fp32Buffers):
    """D linear functions of a patch's pixels, of variance 1 on average. `fit` sets them.

    `pca`: the leading principal components. `random`: D random orthonormal directions.
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, kind: Literal["pca", "random"], patches: int, values: int, width: int) -> None:
        """values: F. width: D, at most F."""
        super().__init__()
        assert width <= values
        self.kind, self.patches = kind, patches
        # `zero.Init` creates every tensor in the compute dtype, whatever dtype is requested.
        self.register_buffer("mean", torch.zeros(values).float())
        self.register_buffer("basis", torch.zeros(width, values).float())

    def forward(self, images: Tensor) -> Tensor:
        """Targets [B, N, D] fp32 of uint8 images [B, 3, S, S]."""
        return (patch_pixels(images, self.patches) - self.mean) @ self.basis.T

    def fit(self, parts: Sequence[Tensor], seed: int) -> tuple[Tensor, Tensor]:
        """Mean [F] and basis [D, F], fp64, from the patches of uint8 images [B, 3, S, S] on the CPU, in parts."""
        width, values = self.basis.shape
        total, products, count = torch.zeros(values).double(), torch.zeros(values, values).double(), 0
        for images in parts:
            rows = patch_pixels(images, self.patches, torch.float64).flatten(0, 1)
            total, products, count = total + rows.sum(0), products + rows.T @ rows, count + len(rows)
        mean = total / count
        covariance = products / count - torch.outer(mean, mean)
        if self.kind == "pca":
            directions = torch.linalg.eigh(covariance).eigenvectors[:, -width:].flip(1)
        else:
            drawn = torch.randn(len(mean), width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            directions = torch.linalg.qr(drawn).Q
        variance = ((covariance @ directions) * directions).sum() / width
        return mean, directions.T / variance.sqrt()
