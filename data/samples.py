"""Decoded samples; unreadable ones are replaced by a neighbour, and counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from .bucket_rule import Shape
from .buckets import Buckets
from .errors import BadSample, DataError
from .index import CAPTION_TYPE
from .shards import Dataset, RawSample
from .source_images import SOURCE_IMAGE
from .transforms import decode_shapes


@dataclass(frozen=True)
class Item:
    """One sample, decoded."""

    epoch: int
    index: int
    """Number within the dataset. Epoch and index are those of the planned sample, which keeps draws keyed on them
    stable."""
    key: str
    """Key, image and caption are those of the sample that was read: the planned one or its replacement."""
    image: np.ndarray
    """uint8 [S, S, 3], or in the shape of the sample's bucket."""
    caption: str
    others: tuple[np.ndarray, ...] = ()
    """The same image at the loader's further sizes."""
    origin: tuple[int, int] = (0, 0)
    """Shard and number within it of the sample that was read."""
    caption_member: str = CAPTION_TYPE
    """Extension of the member that the caption is from, drawn for the planned sample."""
    bucket: int = 0
    """Number of its bucket, if there are some."""
    source_image: np.ndarray | None = None
    """Of an editing pair, the source image in the shape of `image`."""
    question: str | None = None
    """Of an understanding source, the question whose answer is `caption`."""


class ReadableSamples:
    """Decoded samples of a dataset, unreadable ones replaced by their next readable neighbour, of the same bucket.

    image_sizes: of squares. buckets: of the dataset, of whose shapes as many are used instead.
    """

    def __init__(self, dataset: Dataset, image_sizes: tuple[int, ...], buckets: Buckets | None = None) -> None:
        self.dataset = dataset
        self.buckets = buckets
        self._squares = [(size, size) for size in image_sizes]
        self._bad: dict[tuple[int, int, str | None], BadSample] = {}
        """By place and member of the caption: another caption of the sample may be readable."""

    def read(self, epoch: int, shard: int, sample: int, index: int, replaced: list[tuple[str, str]]) -> Item:
        """The planned sample, or the first readable one after it: within its shard, wrapping, then in the other shards
        of its source.
        Appends key and reason of an unreadable planned sample to `replaced`. Raises DataError if none is readable."""
        planned, bucket, shapes = None, 0, self._squares
        if self.buckets:
            bucket = self.buckets.number(shard, sample)
            shapes = self.buckets.buckets[bucket].shapes[: len(self._squares)]
        for place in self._candidates(shard, sample, bucket):
            candidate = *place, self.dataset.caption_member(*place, epoch, index)
            if candidate not in self._bad:
                try:
                    raw = self.dataset.read(*place, epoch, index)
                    found = self._contents(raw, shapes)
                except BadSample as error:
                    self._bad[candidate] = error
                else:
                    if planned:
                        replaced.append((planned.key, planned.reason))
                    rest = {"origin": place, "caption_member": raw.caption_member, "bucket": bucket}
                    return Item(epoch, index, raw.key, **found, **rest)
            planned = planned or self._bad[candidate]
        raise DataError(f"no sample of the dataset is readable, the first: {planned}; name other shards")

    def _contents(self, raw: RawSample, shapes: Sequence[Shape]) -> dict[str, Any]:
        """The fields of an item that are decoded from its sample. BadSample if they cannot be."""
        image, *others = _decoded(raw.key, "", raw.image, shapes)
        found = {"image": image, "caption": raw.caption, "others": tuple(others)}
        if raw.source_image is not None:
            (found["source_image"],) = _decoded(raw.key, SOURCE_IMAGE, raw.source_image, shapes[:1])
        return found

    def _candidates(self, shard: int, sample: int, bucket: int) -> Iterator[tuple[int, int]]:
        counts, shards = self.dataset.samples_per_shard, self.dataset.source_shards(shard)
        for here in chain(range(shard, shards.stop), range(shards.start, shard)):
            count, first = int(counts[here]), sample if here == shard else 0
            for candidate in ((first + k) % count for k in range(count)):
                if not self.buckets or self.buckets.number(here, candidate) == bucket:
                    yield here, candidate


def _decoded(key: str, which: str, image: bytes, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """The image in all shapes; BadSample with what is wrong with it. which: of the sample's images, for the reason."""
    try:
        return decode_shapes(image, shapes)
    except ValueError as error:
        raise BadSample(key, f"{which}{error}") from None


class BadSamples:
    """Counts replaced samples, and stops the run when they are too many.

    max_bad_fraction: largest fraction of replaced samples; checked once `judged_after` samples were seen, since one bad
    sample among the first ten is not significant.
    """

    judged_after = 100
    listed = 3

    def __init__(self, max_bad_fraction: float) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.bad = 0
        self.seen = 0
        self._reasons: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        """Reason -> key of its first sample."""

    def add(self, replaced: list[tuple[str, str]], seen: int) -> None:
        """Count `seen` samples, `replaced` among them. Raises DataError with the commonest reasons when the fraction is
        too large."""
        self.bad += len(replaced)
        self.seen += seen
        for key, text in replaced:
            reason = re.sub(r"\d[\d.,]*", "N", text)  # of the size of an image, for example
            self._reasons[reason] += 1
            self._first.setdefault(reason, f"{key} ({text})")
        if self.seen >= self.judged_after and self.bad > self.max_bad_fraction * self.seen:
            listed = self._reasons.most_common(self.listed)
            named = ", ".join(f"{count} like {self._first[reason]}" for reason, count in listed)
            rest = self.bad - sum(count for _, count in listed)
            raise DataError(
                f"{self.bad} of {self.seen} samples were unreadable, above data.max_bad_fraction"
                f" {self.max_bad_fraction}: {named}{f', and {rest} more' if rest else ''}; make shards without"
                " them, for a new run, with `bifrost data ingest SHARDS NEW`, or raise data.max_bad_fraction"
            )
