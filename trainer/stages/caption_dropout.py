"""Captions that are replaced by the empty one, for classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...data import Dataset, Item
from ...recipes.schema import Data
from ..models.rng import Stream, chosen


class CaptionDropout:
    """Draws which samples lose their caption, from (seed, epoch, index).

    share: the probability, unless `data` has another one for a sample's source. dataset: opened from `data`.
    """

    def __init__(self, seed: int, share: float, data: Data | None = None, dataset: Dataset | None = None) -> None:
        self.seed, self.share, self.dataset = seed, share, dataset
        sources = data.trained if data else ()
        self._of_source = [share if each.caption_dropout is None else each.caption_dropout for each in sources]

    def __call__(self, items: Sequence[Item]) -> npt.NDArray[np.bool_]:
        """Whether the caption of each item is dropped, bool [B]."""
        epoch, index = (np.array([getattr(one, name) for one in items], dtype=np.int64) for name in ("epoch", "index"))
        return chosen(self.seed, Stream.CAPTION_DROPOUT, epoch, index, np.array([self._of(item) for item in items]))

    def _of(self, item: Item) -> float:
        if self.dataset is None or not self._of_source:
            return self.share
        return self._of_source[self.dataset.source(item.origin[0])]
