"""The shapes of aspect-ratio buckets, and in which of them an image is. Imports no image library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Shape = tuple[int, int]
"""Height and width in pixels."""
LEFT_OUT = 255
"""In place of a bucket's number: the sample is in none."""


@dataclass(frozen=True)
class Bucket:
    """A shape of images. shapes: of each image that is made of a sample, all of the same ratio; the last one is its
    name."""

    shapes: tuple[Shape, ...]

    @property
    def largest(self) -> Shape:
        return max(self.shapes)

    def __str__(self) -> str:
        height, width = self.shapes[-1]
        return f"{width}x{height}"


@dataclass(frozen=True)
class BucketRule:
    """Which bucket an image belongs to: of the largest area to which it need not be enlarged more than `max_upscale`
    times on either side, the bucket with the nearest ratio, by the difference of logarithms.

    areas: the buckets of each area, from the largest area to the smallest.
    """

    areas: tuple[tuple[Bucket, ...], ...]
    max_upscale: float

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """All buckets, by their numbers."""
        return tuple(bucket for area in self.areas for bucket in area)

    def assign(self, sizes: np.ndarray) -> np.ndarray:
        """Numbers of the buckets, uint8 [n], of images with these widths and heights, int64 [n, 2]; zeros for an
        unknown size. `LEFT_OUT` where every area would enlarge the image too much, or its size is unknown."""
        width, height = sizes.astype(np.float64).T
        found = np.full(len(sizes), LEFT_OUT, dtype=np.uint8)
        first = 0
        for area in self.areas:
            shapes = np.array([bucket.largest for bucket in area], dtype=np.float64)
            order = np.argsort(shapes[:, 1] / shapes[:, 0], kind="stable")
            nearest = np.zeros(len(sizes), dtype=np.int64)
            for narrow, wide in pairwise(shapes[order]):
                # Between two ratios is their geometric mean; unlike logarithms, products are equal on every processor.
                nearest += width**2 * (narrow[0] * wide[0]) > height**2 * (narrow[1] * wide[1])
            chosen = order[nearest]
            fits = (shapes[chosen, 1] <= width * self.max_upscale) & (shapes[chosen, 0] <= height * self.max_upscale)
            new = fits & (found == LEFT_OUT)
            found[new] = first + chosen[new]
            first += len(area)
        return found

    def of(self, image: bytes) -> Bucket | None:
        """The bucket of an image file; None if all would enlarge it too much. Raises ValueError for one that does not
        decode."""
        from .transforms import image_size  # imports Pillow

        size = image_size(image)
        if size is None:
            raise ValueError("image does not decode: its header is damaged")
        number = int(self.assign(np.array([size]))[0])
        return None if number == LEFT_OUT else self.buckets[number]

    def nearest(self, image: bytes) -> Bucket:
        """As `of`, but the smallest area's if all would enlarge it too much."""
        found = self.of(image) or BucketRule(self.areas[-1:], math.inf).of(image)
        assert found is not None
        return found
