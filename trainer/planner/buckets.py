"""What a plan shows of aspect-ratio buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...recipes.schema import Data
from ..models import image_grids
from ..models.image_grids import Grid, only_largest
from .flops import patch_latent_parts
from .flux_flops import controlnet_parts
from .opened import LatentControl, PatchLatents
from .timing import useful_flops

if TYPE_CHECKING:
    from ...data.bucket_rule import BucketRule


@dataclass(frozen=True)
class PlannedBucket:
    """One shape. tokens: FLUX's, None in stage 1. share: of the samples, None if it is not known. flops: useful ones
    per sample."""

    shape: str
    latents: Grid
    tokens: Grid | None
    share: float | None
    flops: float
    largest: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "latents": list(self.latents),
            **({"tokens": list(self.tokens)} if self.tokens else {}),
            "share": self.share,
            "useful_flops": self.flops,
            "largest": self.largest,
        }

    def cells(self) -> tuple[str, ...]:
        rows, columns = self.latents
        share = "" if self.share is None else f"{self.share:.4g}"
        memory = "memory is planned for this one" if self.largest else ""
        return self.shape, f"{rows} x {columns}", share, f"{self.flops / 1e12:.4g}", memory


def rule_of(model: PatchLatents | LatentControl, data: Data) -> BucketRule:
    """In which bucket of `data.buckets` an image is."""
    assert data.buckets is not None
    flux_size = model.flux.image_size if isinstance(model, LatentControl) else None
    return image_grids.rule_of(data.buckets, data.image_size, model.square, flux_size)


def planned_buckets(
    model: PatchLatents | LatentControl,
    data: Data,
    precision: str,
    text_tokens: float,
    shares: Sequence[float] | None,
) -> list[PlannedBucket]:
    """The shapes of `data.buckets`, by their numbers; none without. precision: `bf16` or `fp32`. text_tokens: of a
    prompt of stage 1 on average."""
    if data.buckets is None:
        return []
    marks = only_largest(model.grids)
    found = []
    for number, (bucket, grid) in enumerate(zip(rule_of(model, data).buckets, model.grids, strict=True)):
        if isinstance(model, LatentControl):
            tokens, parts = grid.tokens, controlnet_parts(model, precision, grid)
        else:
            tokens, parts = None, patch_latent_parts(model, precision, text_tokens, grid=grid.latents)
        share = None if shares is None else shares[number]
        found.append(PlannedBucket(str(bucket), grid.latents, tokens, share, useful_flops(parts), marks[number] > 0))
    return found
