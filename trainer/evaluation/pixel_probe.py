"""A linear probe of patch latents: the pixels of a patch from its latent, by ridge regression.

Legend: B images of S x S pixels, N patch latents of width D, C = 3 S^2 / N values of a patch's pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.pixel_targets import patch_pixels

PENALTY = 1e-4
"""Of the latents' mean square, added to every one of the D."""
AT_ONCE = 64


class PixelProbe:
    """Weights [D + 1, C] of the regression, fp64, fitted in closed form.

    parts: latents [B, N, D] with their images, uint8 [B, 3, S, S], of which N are the patches in raster order.
    """

    def __init__(self, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        squares = products = torch.zeros((), dtype=torch.float64)
        rows = 0
        for latents, images in parts:
            x, y = (
                _with_one(latents),
                patch_pixels(images.to(latents.device), latents.shape[1], torch.float64).flatten(0, 1),
            )
            squares, products, rows = x.T @ x + squares.to(x.device), x.T @ y + products.to(x.device), rows + len(x)
        assert rows, "no images to fit the probe on"
        penalty = torch.full_like(squares.diag(), PENALTY * float(squares.diag()[:-1].mean()))
        penalty[-1] = 0  # of the bias
        self.weights = torch.linalg.solve(squares + penalty.diag(), products)

    def images(self, latents: Tensor) -> np.ndarray:
        """uint8 [B, S, S, 3] from latents [B, N, D]."""
        return np.concatenate([self._images(part) for part in latents.split(AT_ONCE)])

    def _images(self, latents: Tensor) -> np.ndarray:
        samples, patches, _ = latents.shape
        side = math.isqrt(patches)
        pixels = _with_one(latents) @ self.weights
        unit = math.isqrt(pixels.shape[-1] // 3)
        pixels = pixels.view(samples, side, side, 3, unit, unit).permute(0, 1, 4, 2, 5, 3)
        pixels = pixels.reshape(samples, side * unit, side * unit, 3)
        return (pixels * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def _with_one(latents: Tensor) -> Tensor:
    """Latents [B, N, D] as rows [B * N, D + 1], fp64, with a last column of ones."""
    return F.pad(latents.double().flatten(0, 1), (0, 1), value=1.0)
