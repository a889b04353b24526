"""Images as the encoders of a cache read them: squares, or in the shape of their aspect-ratio bucket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...data import decode_image
from ...data.bucket_rule import Bucket, BucketRule, Shape
from ...data.transforms import decode_shapes


@dataclass(frozen=True)
class EncoderImages:
    """Of one encoder. size: side of a square in pixels. which: the number of its shape among those of a bucket."""

    size: int
    rule: BucketRule | None = None
    which: int = 0

    @property
    def shapes(self) -> Sequence[Shape]:
        """Height and width in pixels of every bucket, or of the square."""
        if self.rule is None:
            return [(self.size, self.size)]
        return [bucket.shapes[self.which] for bucket in self.rule.buckets]

    @property
    def missing(self) -> str:
        """What samples that cannot be read are."""
        return "unreadable" if self.rule is None else "unreadable or in no bucket"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What determines in which shape an image is, in addition to `size`."""
        if self.rule is None:
            return {}
        shapes = [[[list(shape) for shape in bucket.shapes] for bucket in area] for area in self.rule.areas]
        return {"data.buckets": {"shapes": shapes, "max_upscale": self.rule.max_upscale}}

    def read(self, image: bytes) -> Tensor:
        """uint8 [3, H, W]. Raises ValueError if the image is unreadable, or in no bucket, so that no run reads it."""
        if self.rule is None:
            return _channels_first(decode_image(image, self.size))
        return _channels_first(decode_shapes(image, self._bucket(self.rule, image).shapes)[self.which])

    def shape(self, image: bytes) -> Shape:
        """Height and width of what `read` returns, from the image's header. Raises ValueError if it is in no bucket."""
        return (self.size, self.size) if self.rule is None else self._bucket(self.rule, image).shapes[self.which]

    def _bucket(self, rule: BucketRule, image: bytes) -> Bucket:
        if (bucket := rule.of(image)) is None:
            raise ValueError("in no bucket")
        return bucket


def _channels_first(pixels: Any) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
