"""Similarity of images, in pixels and in feature vectors.

Legend: B images of H x W pixels, Q queries, G gallery images, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_PSNR = 100.0
"""dB assigned to identical images."""


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """10 log10(255^2 / mean squared difference) of uint8 images [B, 3, H, W]: dB [B], fp64."""
    error = (one.double() - other.double()).square().flatten(1).mean(1)
    return (10 * (255**2 / error).log10()).clamp(max=LARGEST_PSNR)


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of uint8 images [B, 3, H, W] of at least 11 x 11 pixels: [B], fp64.

    Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment: from error visibility to structural similarity":
    Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, L = 255, mean over all windows inside the image;
    here also over the three colours.
    """
    offsets = torch.arange(11, dtype=torch.float64, device=one.device) - 5
    bell = (-offsets.square() / (2 * 1.5**2)).exp()
    bell = bell / bell.sum()

    def blurred(x: Tensor) -> Tensor:
        x = x.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(x, bell.view(1, 1, 11, 1)), bell.view(1, 1, 1, 11))

    x, y = one.double(), other.double()
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similar = similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similar.view(len(one), -1).mean(1)


def frechet(one: Tensor, other: Tensor) -> float:
    """Squared Fréchet distance between Gaussians fitted to vectors [Q, F] and [G, F], two or more each.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) as in Heusel et al. 2017 (FID), but on other features; the
    square root from the eigenvalues of the symmetric product, in fp64.
    """
    one, other = one.double(), other.double()
    first, second = torch.atleast_2d(one.T.cov()), torch.atleast_2d(other.T.cov())
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    means = (one.mean(0) - other.mean(0)).square().sum()
    return max(0.0, float(means + first.trace() + second.trace() - 2 * overlap))  # -1e-15 for equal sets


def centred_cosine(queries: Tensor, gallery: Tensor) -> Tensor:
    """Cosines [Q, G] of vectors [Q, F] and [G, F] after subtracting the gallery's mean from both."""
    mean = gallery.mean(0)
    return F.normalize(queries - mean, dim=1) @ F.normalize(gallery - mean, dim=1).T


def recall(alike: Tensor, own: Tensor, first: int) -> float:
    """Fraction of queries whose own gallery entry, `own` [Q], is among the `first` most similar of `alike` [Q, G].

    Ties do not count against it; NaN does.
    """
    mine = alike.gather(1, own[:, None])
    before = (~(alike <= mine)).sum(1)
    return float((before < first).double().mean())


class NearestPixels:
    """Whether the image nearest to each query is its own, over a gallery added in parts.

    queries: uint8 [Q, 3, H, W]. own: the key of each query's own image. Distances are Euclidean and exact, as they are
    sums of integers in fp64.
    """

    def __init__(self, queries: Tensor, own: list[tuple[str, int]]) -> None:
        self.queries = queries.flatten(1).double()
        self.squares = self.queries.square().sum(1)
        self.place = {key: number for number, key in enumerate(own)}
        self.mine = torch.full((len(own),), torch.inf, dtype=torch.float64, device=queries.device)
        self.nearest = self.mine.clone()
        self.seen = 0

    def add(self, keys: list[tuple[str, int]], images: Tensor) -> None:
        """Gallery images uint8 [G, 3, H, W] with their keys."""
        gallery = images.flatten(1).double()
        distance = self.squares[:, None] + gallery.square().sum(1) - 2 * self.queries @ gallery.T
        for column, key in enumerate(keys):
            if (number := self.place.get(key)) is not None:
                self.mine[number] = distance[number, column]
        self.nearest = torch.minimum(self.nearest, distance.amin(1))
        self.seen += len(keys)

    def hits(self) -> Tensor:
        """bool [Q]: the query's own image was added, and none was nearer."""
        return self.mine.isfinite() & (self.mine <= self.nearest)
