"""What a plan shows of aspect-ratio buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...recipes.schema import Data
from ..models.image_grids import ImageGrid, bucket_grids, bucket_rule, only_largest
from .flux_flops import controlnet_parts
from .opened import LatentControl
from .timing import useful_flops

if TYPE_CHECKING:
    from ...data.bucket_rule import BucketRule


@dataclass(frozen=True)
class PlannedBucket:
    """One shape. share: of the samples, None if it is not known. flops: useful ones per sample."""

    shape: str
    grid: ImageGrid
    share: float | None
    flops: float
    largest: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "latents": list(self.grid.latents),
            "tokens": list(self.grid.tokens),
            "share": self.share,
            "useful_flops": self.flops,
            "largest": self.largest,
        }

    def cells(self) -> tuple[str, ...]:
        rows, columns = self.grid.latents
        share = "" if self.share is None else f"{self.share:.4g}"
        memory = "memory is planned for this one" if self.largest else ""
        return self.shape, f"{rows} x {columns}", share, f"{self.flops / 1e12:.4g}", memory


def rule_of(model: LatentControl, data: Data) -> BucketRule:
    """In which bucket of `data.buckets` an image is."""
    assert data.buckets is not None
    square = model.square
    units = data.image_size // square.latents[0], model.flux.image_size // square.tokens[0]
    grids = bucket_grids(data.buckets, data.image_size, square)
    return bucket_rule(grids, units, data.buckets.max_upscale)


def planned_buckets(
    model: LatentControl, data: Data, precision: str, shares: Sequence[float] | None
) -> list[PlannedBucket]:
    """The shapes of `data.buckets`, by their numbers. precision: `bf16` or `fp32`."""
    marks = only_largest(model.grids)
    return [
        PlannedBucket(
            str(bucket),
            grid,
            None if shares is None else shares[number],
            useful_flops(controlnet_parts(model, precision, grid)),
            marks[number] > 0,
        )
        for number, (bucket, grid) in enumerate(zip(rule_of(model, data).buckets, model.grids, strict=True))
    ]
