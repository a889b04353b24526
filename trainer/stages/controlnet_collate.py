"""Micro-batches of stage 2: images or cached tensors, text, noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data import Item, stacked
from ..models.draws import gaussian
from ..models.flux import FluxTokenizers
from ..models.rng import Stream, chosen, uniform
from .caption_dropout import CaptionDropout
from .caption_exchange import CaptionExchange
from .latent_cache import Cache, Kind


@dataclass(frozen=True)
class Cached:
    """Caches of the shards that items come from. predicted_share: probability that a sample's patch latents are those
    that stage 1 predicts."""

    caches: dict[Kind, Cache]
    predicted_share: float = 0.0


class ControlNetCollate:
    """Items of a micro-batch -> arguments of the model; runs in the loader workers.

    Every draw depends on (seed, epoch, index) and its number only; those of a sample are next to each other. The items
    are of one bucket.
    noise_level: of all samples, instead of a draw.
    """

    def __init__(
        self,
        tokenizers: FluxTokenizers,
        latents: Sequence[tuple[int, int, int]],
        cached: Cached,
        seed: int,
        dropout: CaptionDropout,
        noise_level: float | None = None,
        exchange: CaptionExchange | None = None,
        draws: int = 1,
    ) -> None:
        """latents: channels, height and width of the VAE's latents, by the number of the items' bucket. exchange: of
        the captions that are not dropped. draws: of noise and its level, per sample."""
        self.tokenizers = tokenizers
        self.latents = latents
        self.caches, self.predicted_share = cached.caches, cached.predicted_share
        self.seed, self.dropout = seed, dropout
        self.noise_level = noise_level
        self.exchange = exchange
        self.draws = draws

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        epoch = np.array([item.epoch for item in items], dtype=np.int64)
        index = np.array([item.index for item in items], dtype=np.int64)
        dropped = self.dropout(items).tolist()
        predicted = chosen(self.seed, Stream.PREDICTED_LATENTS, epoch, index, self.predicted_share).tolist()
        channels, height, width = shape = self.latents[items[0].bucket]
        rows = len(items) * self.draws

        def normal(stream: Stream, *sides: int) -> Tensor:
            numbers = uniform(self.seed, stream, epoch, index, self.draws * int(np.prod(sides)))
            return gaussian(torch.from_numpy(numbers)).view(rows, *sides)

        return {
            **self._patch_latents(items, predicted),
            **self._flux_images(items),
            **self._text(self.exchange(items, dropped) if self.exchange else items, dropped),
            "posterior": normal(Stream.POSTERIOR, *shape),
            "noise": normal(Stream.NOISE, height * width // 4, 4 * channels),
            "level": normal(Stream.NOISE_LEVEL, 1)[:, 0]
            if self.noise_level is None
            else torch.full((rows,), math.log(1 / self.noise_level - 1)),
        }

    def _patch_latents(self, items: list[Item], predicted: list[bool]) -> dict[str, Tensor]:
        """Images, or latents of a cache. Where only some are `predicted` and the others are not cached, both of all
        samples: every rank runs the vision encoder on equally many images, whose sharded weights it gathers."""
        if "vision" in self.caches or self.predicted_share == 1:
            kinds: list[Kind] = ["predicted" if each else "vision" for each in predicted]
            return _stacked([self.caches[k].read(i.origin, i.key) for k, i in zip(kinds, items, strict=True)])
        images = {"images": stacked([item.image for item in items])}
        if "predicted" not in self.caches:
            return images
        latents = _stacked([self.caches["predicted"].read(item.origin, item.key) for item in items])
        return {**images, **latents, "predicted": torch.tensor(predicted)}

    def _flux_images(self, items: list[Item]) -> dict[str, Tensor]:
        if "vae" not in self.caches:
            return {"flux_images": stacked([item.others[0] for item in items])}
        return _stacked([self.caches["vae"].read(item.origin, item.key) for item in items])

    def _text(self, items: list[Item], dropped: list[bool]) -> dict[str, Any]:
        pairs = list(zip(items, dropped, strict=True))
        if cache := self.caches.get("text"):
            found = [cache.empty(i.origin[0]) if drop else cache.read(i.origin, i.key) for i, drop in pairs]
            return _stacked(found)
        captions = ["" if drop else item.caption for item, drop in pairs]
        tokens = self.tokenizers(captions)
        return {**tokens._asdict(), "truncated": self.tokenizers.count_truncated(captions, tokens.t5)}


def _stacked(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
