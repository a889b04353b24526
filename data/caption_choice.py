"""Which members of a sample are read next to its image: one of its captions, drawn by weight among those that it has,
as a pure function of the sample, and a source image."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Container, Mapping
from itertools import accumulate

from .index import CAPTION_TYPE
from .source_images import SourceImages

Draw = Callable[[int, int], float]
"""Epoch and index of the planned sample -> a uniform number in (0, 1)."""


class CaptionChoice:
    """The text members of which one is a sample's caption.

    weights: extension of a member (`short.txt` for KEY.short.txt) -> weight, above 0. draw: needed for several.
    source_images: whether source images are read, too; images: the same of the sample's own image.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        draw: Draw | None = None,
        source_images: SourceImages = "ignored",
        images: SourceImages = "required",
    ) -> None:
        assert draw is not None or len(weights) == 1, "one of several members is drawn"
        self.weights = dict(sorted(weights.items()))  # the order of a mapping in a file must not matter
        self.draw = draw
        self.source_images = source_images
        self.images = images

    @property
    def only(self) -> str | None:
        """The member if there is no choice."""
        return next(iter(self.weights)) if len(self.weights) == 1 else None

    def among(self, members: Container[str], epoch: int, index: int) -> str | None:
        """The extension of the caption of a sample with these `members`; None if none of them is a caption."""
        found = [kind for kind in self.weights if kind in members]
        if len(found) < 2 or self.draw is None:
            return found[0] if found else None
        bounds = list(accumulate(self.weights[kind] for kind in found))
        return found[min(bisect_right(bounds, self.draw(epoch, index) * bounds[-1]), len(found) - 1)]


KEY_TXT = CaptionChoice({CAPTION_TYPE: 1.0})
"""The caption is KEY.txt."""
