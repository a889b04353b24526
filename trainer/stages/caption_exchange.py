"""Captions of other samples, with which the ControlNet learns to follow the latents where text contradicts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...data import BadSample, Dataset, Item
from ..models.rng import Stream, chosen


class CaptionExchange:
    """Gives a fraction of the samples the caption of the next readable sample of their shard.

    The draw depends on (seed, epoch, index) and the caption on the shard, so that micro-batch and number of ranks do
    not matter. Every exchanged caption costs one more read of a sample.
    """

    def __init__(self, dataset: Dataset, seed: int, share: float) -> None:
        self.dataset = dataset
        self.seed, self.share = seed, share

    def __call__(self, items: Sequence[Item], dropped: Sequence[bool]) -> list[Item]:
        """The items; exchanged ones have the caption, key and origin of the other sample, and their own image. Those
        whose caption is `dropped` stay as they are."""
        epoch, index = (
            np.array([getattr(each, name) for each in items], dtype=np.int64) for name in ("epoch", "index")
        )
        exchanged = chosen(self.seed, Stream.CAPTION_EXCHANGE, epoch, index, self.share).tolist()
        pairs = zip(items, exchanged, dropped, strict=True)
        return [self._other(item) if exchange and not drop else item for item, exchange, drop in pairs]

    def _other(self, item: Item) -> Item:
        shard, number = item.origin
        count = int(self.dataset.samples_per_shard[shard])
        for following in range(number + 1, number + count):
            try:
                found = self.dataset.read(shard, following % count, item.epoch, item.index)
            except BadSample:
                continue
            return replace(
                item,
                key=found.key,
                caption=found.caption,
                origin=(shard, following % count),
                caption_member=found.caption_member,
            )
        return item
