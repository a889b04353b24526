"""Similarity of images, in pixels and in feature vectors.

Legend: B images of H x W pixels, Q queries, G gallery images, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

LARGEST_PSNR = 100.0
"""dB assigned to identical images."""


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 images [B, 3, H, W]: dB [B], fp64."""
    found = peak_signal_noise_ratio(one.double(), other.double(), data_range=255.0, reduction="none", dim=(1, 2, 3))
    return found.clamp(max=LARGEST_PSNR)


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of uint8 images [B, 3, H, W] of at least 11 x 11 pixels: [B], fp64.

    Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment: from error visibility to structural similarity":
    Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, L = 255, mean over all windows inside the image;
    here also over the three colours. torchmetrics' own mean includes windows beyond the edges, on mirrored pixels.
    """
    _, similarity = structural_similarity_index_measure(
        one.double(), other.double(), sigma=1.5, data_range=255.0, reduction="none", return_full_image=True
    )
    return similarity[..., 5:-5, 5:-5].flatten(1).mean(1)


def frechet(one: Tensor, other: Tensor) -> float:
    """Squared Fréchet distance between Gaussians fitted to vectors [Q, F] and [G, F], two or more each.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) as in Heusel et al. 2017 (FID), but on other features. For
    C1 = A^T A and C2 = B^T B the trace of the root is the nuclear norm of A B^T, which is exact with fewer vectors than
    features; torchmetrics takes the eigenvalues of C1 C2, which are then off by 1e-3 and take minutes for 2048
    features.
    """
    means = (one.double().mean(0) - other.double().mean(0)).square().sum()
    a, b = _deviations(one), _deviations(other)
    overlap = torch.linalg.matrix_norm(a @ b.T, "nuc")
    return max(0.0, float(means + a.square().sum() + b.square().sum() - 2 * overlap))  # -1e-15 for equal sets


def _deviations(vectors: Tensor) -> Tensor:
    """A root of the covariance of `vectors` [Q, F]: A [min(Q, F), F] in fp64 with A^T A = C."""
    found = (vectors.double() - vectors.double().mean(0)) / (len(vectors) - 1) ** 0.5
    # R of A = QR has the same A^T A, and does not grow with the number of vectors.
    return torch.linalg.qr(found, mode="r").R if len(found) > found.shape[1] else found


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
