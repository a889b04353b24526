"""Images with captions, or editing pairs, of an evaluation, chosen from shards by the seed and their index."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...data import Dataset
from ...data.bucket_rule import Bucket, BucketRule
from ...data.errors import BadSample
from ...data.shard_list import format_shards
from ...data.shards import RawSample
from ...data.transforms import decode_shapes
from ..errors import RunError
from ..inference.masked_decoding import NO_EPOCH
from ..models.rng import IntArray, Stream, uniform

GALLERY = 4096
"""Images of a data set, at most, that are looked at beyond the chosen ones, where nothing else is asked for."""


@dataclass(frozen=True)
class Sample:
    """One image-caption pair, or one editing pair, whose caption is its instruction."""

    index: int
    """Index in its data set."""
    key: str
    caption: str
    seen: np.ndarray
    """uint8 [S, S, 3], the image at the vision encoder's size."""
    original: np.ndarray
    """uint8 [P, P, 3], the image at FLUX's size."""
    bucket: Bucket | None = field(default=None, kw_only=True)
    """In whose shapes both images are instead, if the set has a rule of buckets."""
    source: tuple[np.ndarray, np.ndarray] | None = field(default=None, kw_only=True)
    """Of an editing pair, its source image in the shapes of `seen` and `original`."""


class SampleSet:
    """The samples of one data set in the order of evaluations with `seed`.

    sizes: S and P of `Sample`, or the rule of its buckets. only: samples of this bucket alone. dataset: of
    editing pairs if it was opened to require source images.
    """

    def __init__(
        self,
        name: str,
        dataset: Dataset,
        seed: int,
        sizes: tuple[int, int] | BucketRule,
        only: Bucket | None = None,
    ) -> None:
        self.name = name
        self.dataset = dataset
        self.sizes, self.only = sizes, only
        index = np.arange(len(dataset))
        draws = uniform(seed, Stream.MASK_RATE, np.full_like(index, NO_EPOCH), index, 1)[:, 0]
        self.order: IntArray = draws.argsort(kind="stable")

    def choose(self, count: int, known: Collection[bytes] = ()) -> list[Sample]:
        """The first `count` readable samples with distinct captions and images whose hashes are not in `known`.

        Samples with equal captions would be indistinguishable, unless they have different source images.
        """
        chosen: dict[tuple[str, bytes | None], Sample] = {}
        trained = 0
        for index in self.order:
            raw = self.raw(int(index))
            if raw is None or (prompt := _prompt(raw)) in chosen:
                continue
            if known and image_hash(raw) in known:
                trained += 1
            elif sample := self._decoded(int(index), raw):
                chosen[prompt] = sample
                if len(chosen) == count:
                    return list(chosen.values())
        shared = f" ({trained} others share an image with --data)" if trained else ""
        shape = f" of shape {self.only}" if self.only else ""
        kind = f"samples{shape} with distinct captions{' or source images' * holds_pairs(self.dataset)}"
        raise RunError(
            f"{format_shards(self.dataset.shards)}: {len(chosen)} readable {kind}{shared}, {count} requested: lower"
            " --samples, or give more shards"
        )

    def image_hashes(self, most: int) -> set[bytes]:
        """Hashes of the images of the first `most` samples; see `image_hash`."""
        found = (self.raw(int(index)) for index in self.order[:most])
        return {image_hash(raw) for raw in found if raw is not None}

    def gallery(self, most: int, chunk: int, chosen: Sequence[int] = ()) -> Iterator[list[Sample]]:
        """The readable ones among the first `most` samples and `chosen` ones beyond, in lists of `chunk`."""
        part: list[Sample] = []
        for index in dict.fromkeys([*self.order[:most].tolist(), *chosen]):
            if sample := self.read(index):
                part.append(sample)
            if len(part) == chunk:
                yield part
                part = []
        if part:
            yield part

    def read(self, index: int) -> Sample | None:
        """One sample; None if it has no caption or no readable image."""
        raw = self.raw(index)
        return raw and self._decoded(index, raw)

    def raw(self, index: int) -> RawSample | None:
        """One sample as stored; None if it has no image or caption."""
        try:
            return self.dataset.read(*self.dataset.place(index))
        except BadSample:
            return None

    def key(self, index: int) -> str:
        """The sample's key, from the index of its shard."""
        return self.dataset.entry(*self.dataset.place(index))[0]

    def _decoded(self, index: int, raw: RawSample) -> Sample | None:
        try:
            bucket = self.sizes.nearest(raw.image) if isinstance(self.sizes, BucketRule) else None
            if self.only not in (None, bucket):
                return None
            shapes = bucket.shapes if bucket else [(size, size) for size in cast(tuple[int, int], self.sizes)]
            seen, original = decode_shapes(raw.image, shapes)
            before = None if raw.source_image is None else decode_shapes(raw.source_image, shapes)
        except ValueError:
            return None
        source = (before[0], before[1]) if before else None
        return Sample(index, raw.key, raw.caption, seen, original, bucket=bucket, source=source)


def choose_sets(
    data: Dataset,
    heldout: Dataset | None,
    seed: int,
    sizes: tuple[int, int] | BucketRule,
    samples: int,
    gallery: int,
    only: Bucket | None = None,
) -> tuple[list[SampleSet], dict[str, list[Sample]]]:
    """The data sets `train` and optionally `heldout`, and `samples` of each, the same for the same seed.

    Held-out images that are among the first `gallery` training images are skipped. sizes, only: of `SampleSet`.
    RunError if a set has too few.
    """
    sets = [SampleSet("train", data, seed, sizes, only)]
    if heldout is not None:
        sets.append(SampleSet("heldout", heldout, seed, sizes, only))
    known = sets[0].image_hashes(gallery) if heldout is not None else set()
    return sets, {one.name: one.choose(samples, () if one is sets[0] else known) for one in sets}


def holds_pairs(dataset: Dataset) -> bool:
    """Whether it was opened as editing pairs."""
    return dataset.captions.source_images == "required"


def _prompt(raw: RawSample) -> tuple[str, bytes | None]:
    source = raw.source_image
    return raw.caption, None if source is None else hashlib.sha256(source).digest()


def image_hash(raw: RawSample) -> bytes:
    """Of the image; of an editing pair, of both images: other pairs may have the same target."""
    return hashlib.sha256(raw.image + (raw.source_image or b"")).digest()


def stack(images: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """uint8 [B, 3, H, W] of RGB images of one size."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def shown_sources(samples: Sequence[Sample]) -> list[Tensor] | None:
    """Source images of editing pairs as the vision encoder reads them, each uint8 [3, S, S]; None of other samples."""
    found = [sample.source[0] for sample in samples if sample.source is not None]
    return list(stack(found)) if found else None
