"""The grids of an image, patch latents and FLUX's tokens, as a square and in aspect-ratio buckets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...recipes.data import Buckets, Data
from ..errors import RunError

if TYPE_CHECKING:
    from ...data.bucket_rule import BucketRule, Shape

Grid = tuple[int, int]
"""Rows and columns."""


@dataclass(frozen=True)
class ImageGrid:
    """Both grids of one shape. Stage 1 has no tokens; in it, both are that of the patch latents."""

    latents: Grid
    tokens: Grid

    @property
    def area(self) -> int:
        """Patch latents and tokens together, by which shapes are ordered."""
        return math.prod(self.latents) + math.prod(self.tokens)


def square_grid(side: int, tokens: int) -> ImageGrid:
    """The grids of a square with `side` patch latents and `tokens` tokens along each side."""
    return ImageGrid((side, side), (tokens, tokens))


def patch_grid(shape: Shape, image_size: int, side: int) -> Grid:
    """Rows and columns of the patches of an image. shape: its height and width in pixels for the vision encoder, which
    cuts the square of `image_size` pixels into `side` x `side` patches."""
    unit = image_size // side
    height, width = shape
    return height // unit, width // unit


def bucket_grids(buckets: Buckets, image_size: int, square: ImageGrid) -> list[list[ImageGrid]]:
    """The grids of every bucket, by area from the largest, in the order of the ratios.

    A square with n cells along its side has the ratio a : b with n sqrt(b / a) rows and n sqrt(a / b) columns, rounded.
    A cell is a patch latent or a token, whichever is larger. image_size: of `square`, in pixels of the vision encoder.
    RunError for an area that is not a whole number of cells, and for two buckets of the same shape.
    """
    cells = min(square.latents[0], square.tokens[0])
    cell = image_size // cells
    found, named = [], {}
    for area in sorted(buckets.areas or [image_size], reverse=True):
        if area < cell or area % cell:
            near = max(1, round(area / cell)) * cell
            raise RunError(f"data.buckets.areas: {area} is not a multiple of {cell} pixels; set {near}")
        shapes = []
        for text, (wide, high) in zip(buckets.ratios, buckets.numbers, strict=True):
            count = area // cell
            rows, columns = _whole(count * math.sqrt(high / wide)), _whole(count * math.sqrt(wide / high))
            if (other := named.setdefault((rows, columns), f"{text} of {area} px")) != f"{text} of {area} px":
                raise RunError(
                    f"data.buckets: {other} and {text} of {area} px are the same shape, {columns} x {rows} cells of"
                    f" {cell} px; leave one out"
                )
            shapes.append(_scaled(square, cells, rows, columns))
        found.append(shapes)
    return found


def every_grid(buckets: Buckets | None, image_size: int, square: ImageGrid) -> tuple[ImageGrid, ...]:
    """The grids of every bucket, by its number, or of the square without buckets."""
    if buckets is None:
        return (square,)
    return tuple(grid for area in bucket_grids(buckets, image_size, square) for grid in area)


def latent_buckets(data: Data, side: int) -> tuple[tuple[Grid, ...], BucketRule | None]:
    """Stage 1: the grid of patch latents of every bucket, by its number, and in which bucket an image is; that of the
    square of `side` patches alone, and None, without buckets. RunError as of `bucket_grids`."""
    square = square_grid(side, side)
    rule = rule_of(data.buckets, data.image_size, square) if data.buckets else None
    return tuple(grid.latents for grid in every_grid(data.buckets, data.image_size, square)), rule


def rule_of(buckets: Buckets, image_size: int, square: ImageGrid, flux_size: int | None = None) -> BucketRule:
    """In which of the buckets an image is. image_size, flux_size: side of `square` in pixels for the vision encoder and
    for FLUX; None: in stage 1, whose buckets have a shape for the vision encoder alone."""
    from ...data.bucket_rule import Bucket, BucketRule  # imports NumPy

    units = [image_size // square.latents[0]]
    if flux_size is not None:
        units.append(flux_size // square.tokens[0])

    def bucket(grid: ImageGrid) -> Bucket:
        pairs = zip(units, (grid.latents, grid.tokens)[: len(units)], strict=True)
        return Bucket(tuple((unit * rows, unit * columns) for unit, (rows, columns) in pairs))

    grids = bucket_grids(buckets, image_size, square)
    return BucketRule(tuple(tuple(bucket(grid) for grid in area) for area in grids), buckets.max_upscale)


def only_largest(grids: Sequence[ImageGrid]) -> list[float]:
    """Shares of the samples that are all in the bucket that takes most memory and time."""
    return [float(number == largest(grids)) for number in range(len(grids))]


def largest(grids: Sequence[ImageGrid]) -> int:
    """Number of the bucket that takes most memory and time."""
    return max(range(len(grids)), key=lambda number: grids[number].area)


def _whole(value: float) -> int:
    return max(1, math.floor(value + 0.5))


def _scaled(square: ImageGrid, cells: int, rows: int, columns: int) -> ImageGrid:
    latents, tokens = square.latents[0] // cells, square.tokens[0] // cells
    return ImageGrid((rows * latents, columns * latents), (rows * tokens, columns * tokens))
