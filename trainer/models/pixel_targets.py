"""Other targets than the MLLM's own patch latents, for comparison: linear functions of each patch's pixels.

Legend: B images of S x S pixels, N patches in raster order, F values of a patch (of its pixels 3 S^2 / N), D latent
width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .buffers import Fp32Buffers


def patch_pixels(images: Tensor, patches: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels 0 .. 1 of every patch, [B, N, F], of uint8 images [B, 3, S, S]."""
    return by_patch(images.to(dtype).div(255), patches)


def by_patch(planes: Tensor, patches: int) -> Tensor:
    """The values of every patch, [B, N, c H^2 / N], of planes [B, c, H, H]."""
    samples, channels, size, _ = planes.shape
    side = math.isqrt(patches)
    tiles = planes.reshape(samples, channels, side, size // side, side, size // side)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(samples, patches, -1)


class LinearTargets(Fp32Buffers):
    """D linear functions of the F values of a patch, of variance 1 on average. `fit` sets them.

    `pca`: the leading principal components. `random`: D random orthonormal directions; if there are fewer values than
    that, an isometry, from which the values can be recovered.
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, kind: Literal["pca", "random"], patches: int, values: int, width: int) -> None:
        """values: F. width: D, for `pca` at most F."""
        super().__init__()
        assert kind == "random" or width <= values
        self.kind, self.patches = kind, patches
        # `zero.Init` creates every tensor in the compute dtype, whatever dtype is requested.
        self.register_buffer("mean", torch.zeros(values).float())
        self.register_buffer("basis", torch.zeros(width, values).float())

    def values(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of every patch, [B, N, F], of uint8 images [B, 3, S, S]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Targets [B, N, D] fp32 of uint8 images [B, 3, S, S]."""
        return (self.values(images) - self.mean) @ self.basis.T

    def fit(self, parts: Iterable[Tensor], seed: int) -> tuple[Tensor, Tensor]:
        """Mean [F] and basis [D, F], fp64, from `values` [B, N, F] on the CPU, in parts."""
        width, values = self.basis.shape
        total, products, count = torch.zeros(values).double(), torch.zeros(values, values).double(), 0
        for part in parts:
            rows = part.double().flatten(0, 1)
            total, count = total + rows.sum(0), count + len(rows)
            products.addmm_(rows.T, rows)  # in place: F is in the thousands
        mean = total / count
        covariance = products / count - torch.outer(mean, mean)
        if self.kind == "pca":
            directions = torch.linalg.eigh(covariance).eigenvectors[:, -width:].flip(1)
        else:
            drawn = torch.randn(len(mean), width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            directions = torch.linalg.qr(drawn).Q if width <= values else torch.linalg.qr(drawn.T).Q.T
        variance = ((covariance @ directions) * directions).sum() / width
        return mean, directions.T / variance.sqrt()


class EncodedTargets(LinearTargets):
    """Orthonormal random functions of what a frozen encoder gives for a patch.

    `encoder` is set to what `build` returns by the owner of this module, registered or not, and filled by `load`.
    """

    encoder: Any

    def build(self) -> nn.Module:
        """The encoder, without weights."""
        raise NotImplementedError

    def load(self) -> None:
        """Fill the encoder."""
        raise NotImplementedError

    def restore(self) -> None:
        """Rebuild what is not a weight of the encoder, whatever dtype it was built in."""


class PixelTargets(LinearTargets):
    """`LinearTargets` of a patch's pixels."""

    def values(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return patch_pixels(images, self.patches, dtype)
