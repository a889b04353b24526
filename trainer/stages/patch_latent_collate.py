"""Micro-batches of stage 1: images or cached patch latents, prompts with their source images, masks, and a flow head's
noise."""

from __future__ import annotations

from ..models import libraries  # noqa: F401  # isort: skip

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...data import Item, stacked
from ...recipes.schema import Branch
from ..models.image_grids import Grid
from ..models.masking import draw_masks, hidden_counts
from ..models.prompt import PromptTemplate
from ..models.rng import IntArray, Stream, states
from .caption_dropout import CaptionDropout
from .latent_cache import Cache


class PatchLatentCollate:
    """Items of a micro-batch -> arguments of the model; runs in the loader workers.

    Every draw depends on (seed, epoch, index) only. The items are of one bucket.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        branch: Branch,
        seed: int,
        grids: Sequence[Grid],
        cache: Cache | None = None,
        dropout: CaptionDropout | None = None,
    ) -> None:
        """grids: rows and columns of the patches, by the number of the items' bucket. cache: of the patch latents, of
        the shards that items come from. dropout: None: with the branch's probability, whatever the source."""
        self.template = PromptTemplate(tokenizer, branch.max_text_tokens)
        self.dropout = dropout or CaptionDropout(seed, branch.caption_dropout)
        self.mask_rate, self.draws = branch.mask_rate, branch.draws
        self.flow = branch.head == "flow"
        self.seed = seed
        self.grids = grids
        self.cache = cache

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        epoch = np.array([item.epoch for item in items], dtype=np.int64)
        index = np.array([item.index for item in items], dtype=np.int64)
        captions = ["" if drop else item.caption for drop, item in zip(self.dropout(items), items, strict=True)]
        grid = self.grids[items[0].bucket]
        patches = math.prod(grid)
        # Dropout leaves an editing pair its source image: guidance then strengthens the instruction alone.
        shown = [0 if item.source_image is None else patches for item in items]
        input_ids, text_lengths = self.template.batch(captions, shown)
        counts = hidden_counts(self.mask_rate, self.seed, epoch, index, patches, self.draws)
        mask = draw_masks(self.seed, epoch, index, counts, patches)
        return {
            **self.latents(items),
            **self._source_images(items),
            **(self._noise(epoch, index) if self.flow else {}),
            "input_ids": input_ids,
            "text_lengths": text_lengths,
            "truncated": self.template.count_truncated(captions, text_lengths, shown),
            "mask": torch.from_numpy(mask),
            "masked": torch.from_numpy(np.flatnonzero(mask)),
            "grid": grid,
        }

    def _source_images(self, items: list[Item]) -> dict[str, Any]:
        found = [item.source_image for item in items if item.source_image is not None]
        if not found:
            return {}
        begin = self.template.source_begin
        begins = tuple(None if item.source_image is None else begin for item in items)
        return {"sources": stacked(found), "source_begins": begins}

    def _noise(self, epoch: IntArray, index: IntArray) -> dict[str, Tensor]:
        streams = Stream.LATENT_NOISE, Stream.LATENT_NOISE_LEVEL
        found = np.stack([states(self.seed, stream, epoch, index) for stream in streams], axis=1)
        return {"noise": torch.from_numpy(found.view(np.int64))}

    def latents(self, items: list[Item]) -> dict[str, Tensor]:
        """The items' images, or their cached patch latents."""
        if self.cache is None:
            return {"images": stacked([item.image for item in items])}
        return {"latents": torch.stack([self.cache.read(item.origin, item.key)["latents"] for item in items])}
