"""The frozen base's own next-token loss on the understanding sources, which are not trained on.

A source with `batches_per_step` s is read in batches of `global_batch` samples: after step k, the batches from
floor(s (k - 1)) to floor(s k) - 1. Which samples these are is a function of the seed and the batch's number, so that
nothing is stored for a resume. The base never changes: its loss shows how the data of a source drift.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction

import torch

from ...data import Batch, Dataset, Loader, LoaderSettings, Plan, Share
from ...data.mixture import derived_seed
from ...data.texts import ReadableTexts
from ...recipes.data import Data
from ..distributed.process_group import Ranks
from ..monitors.metrics import finite
from ..optim.engine import Engine
from ..stages.base_texts import BaseTextCollate
from ..stages.training_data import open_texts
from .transfer import on_device


@dataclass(frozen=True)
class TextSource:
    """An understanding source. share: batches per step."""

    name: str
    share: Fraction
    dataset: Dataset
    plan: Plan

    def batches(self, step: int) -> range:
        """The batches that are read after `step`, counted from 1."""
        return range(math.floor(self.share * (step - 1)), math.floor(self.share * step))


@dataclass(frozen=True)
class Measured:
    """After one step. metrics: of every source that was read; replaced: key and reason of this rank's unreadable
    samples; unreadable, samples: numbers of all ranks'."""

    metrics: dict[str, float | None]
    replaced: list[tuple[str, str]]
    unreadable: int
    samples: int


def open_text_sources(data: Data, seed: int, ranks: Ranks) -> list[TextSource]:
    """The understanding sources of a recipe; every rank calls it. DataError when the shards of one cannot be used."""
    found = []
    for source in data.understanding:
        dataset = open_texts(source, data, seed, ranks.rank, ranks.gather, ranks.broadcast)
        plan = Plan(dataset.samples_per_shard, derived_seed(seed, "understanding"), data.shuffle_window)
        found.append(TextSource(source.name, Fraction(repr(source.batches_per_step)), dataset, plan))
    return found


class BaseLoss:
    """Measures the losses; every rank calls it after every step."""

    def __init__(
        self,
        sources: Sequence[TextSource],
        collate: BaseTextCollate,
        engine: Engine,
        ranks: Ranks,
        share: Share,
        settings: LoaderSettings,
        steps: int,
    ) -> None:
        """share: of the global batch; settings: of the loaders; steps: of the run."""
        self.sources, self.collate, self.engine, self.ranks = sources, collate, engine, ranks
        self.share, self.settings, self.steps = share, settings, steps
        self._passes = share.global_batch // (share.ranks * share.micro_batch)
        self._open: dict[str, tuple[int, Iterator[Batch]]] = {}
        """Name -> the next batch of its loader, and the loader's micro-batches."""
        self._loaders = ExitStack()

    def due(self, step: int) -> bool:
        """Whether batches are read after `step`."""
        return any(source.batches(step) for source in self.sources)

    def measure(self, step: int) -> Measured:
        """The losses of the batches after `step`."""
        due = [source for source in self.sources if source.batches(step)]
        sums = torch.zeros(len(due), 2, dtype=torch.float64, device=self.ranks.device)
        replaced: list[tuple[str, str]] = []

        def forward() -> None:
            for place, source in enumerate(due):
                for batch in self._micro_batches(source, source.batches(step)):
                    replaced.extend(batch.replaced)
                    sums[place] += self.engine.model(**on_device(batch, self.ranks.device)).sums

        self.engine.undisturbed(forward)
        *found, unreadable = self.ranks.total([*sums.flatten().tolist(), len(replaced)])
        metrics: dict[str, float | None] = {}
        for source, loss, tokens in zip(due, found[::2], found[1::2], strict=True):
            metrics[f"base_loss_{source.name}"] = finite(loss / tokens) if tokens else None
            metrics[f"base_tokens_{source.name}"] = tokens
        samples = self.share.global_batch * sum(len(source.batches(step)) for source in due)
        return Measured(metrics, replaced, int(unreadable), samples)

    def close(self) -> None:
        """Stop the loaders' processes."""
        self._open.clear()
        self._loaders.close()

    def _micro_batches(self, source: TextSource, batches: range) -> Iterator[Batch]:
        """This rank's micro-batches of `batches`."""
        at, loader = self._open.get(source.name, (None, None))
        if loader is None or at != batches.start:
            if loader is not None:  # after a rollback
                self.close()
            loader = self._load(source, batches.start)
        for _ in range(len(batches) * self._passes):
            yield next(loader)
        self._open[source.name] = batches.stop, loader

    def _load(self, source: TextSource, start: int) -> Iterator[Batch]:
        rest = range(start, source.batches(self.steps).stop)
        settings = self.share, rest, self.settings, ReadableTexts
        loader = Loader(source.dataset, source.plan, self.collate, *settings)
        return iter(self._loaders.enter_context(closing(loader)))
