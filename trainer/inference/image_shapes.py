"""The shapes of images that both stages were trained in."""

from __future__ import annotations

from collections.abc import Sequence

from ...data.bucket_rule import Bucket, BucketRule, Shape


def square(image_size: int, flux_size: int) -> Bucket:
    """The bucket of squares. image_size, flux_size: their sides in pixels for the vision encoder and for FLUX."""
    return Bucket(((image_size, image_size), (flux_size, flux_size)))


def buckets_of(rule: BucketRule | None, alone: Bucket) -> tuple[Bucket, ...]:
    """The buckets that a stage was trained in; without a rule `alone`, that of squares."""
    return rule.buckets if rule else (alone,)


def known_to_both(buckets: Sequence[Bucket], shapes: Sequence[Shape]) -> list[str]:
    """The buckets of stage 2 in which stage 1 was trained, too, by their names. shapes: height and width in pixels of
    the vision encoder's images in stage 1."""
    return [str(bucket) for bucket in buckets if bucket.shapes[0] in shapes]
