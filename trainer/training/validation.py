"""Held-out loss during training, every `validation.every` steps and at the last one, on samples that are never trained
on.

Each sample has one fixed level, round-robin over the stage's equidistant mask rates or noise levels, and fixed masks or
noise that depend on nothing but the sample's number: values are comparable between steps, runs and seeds. `val_loss` is
the mean over the levels of each level's mean, which is how MLPerf Training validates FLUX.1; `val_loss_ema` is that of
the averaged weights. Training is not affected: no random state is used, BatchNorm's statistics are kept, and the live
weights are restored bit by bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ...data import Batch, Dataset, Item, ReadableSamples
from ...data.bucket_rule import LEFT_OUT
from ...data.buckets import Buckets
from ...data.reader import Collate
from ...recipes.schema import Validation
from ..distributed.process_group import Ranks
from ..errors import RunError
from ..monitors.metrics import finite
from ..optim.ema import Ema
from ..optim.engine import Engine
from ..optim.train_state import TrainState
from ..stages import Stage
from .transfer import on_device

log = logging.getLogger(__name__)


class _Pass(NamedTuple):
    """One forward pass of this rank. counted: False for a rank without a sample of its own in this pass, which only
    takes part in gathering the weights."""

    level: int
    batch: Batch
    counted: bool


class Spread(NamedTuple):
    """A dataset of which samples are used that are spread evenly, in buckets if these are not None."""

    dataset: Dataset
    buckets: Buckets | None = None

    def numbers(self, samples: int) -> list[int]:
        """Numbers in the dataset of `samples` samples, spread evenly; of fewer if there are not as many."""
        if self.buckets is None:
            used = range(len(self.dataset))
        else:
            used = np.flatnonzero(self.buckets.of != LEFT_OUT).tolist()
        samples = min(samples, len(used))
        return [used[number * len(used) // samples] for number in range(samples)]

    def alike(self, places: Sequence[int], numbers: Sequence[int]) -> list[list[int]]:
        """Those of `places`, which count `numbers`, whose samples are in one bucket, for every bucket."""
        if self.buckets is None:
            return [list(places)]
        found: dict[int, list[int]] = {}
        for place in places:
            found.setdefault(int(self.buckets.of[numbers[place]]), []).append(place)
        return [found[bucket] for bucket in sorted(found)]


class Validator:
    """Measures the held-out loss of a run; every rank calls it at the same steps.

    The samples are read and decoded once, here, so that storage cannot fail a validation. Raises DataError on a rank
    whose share cannot be read.
    """

    def __init__(
        self,
        settings: Validation,
        micro_batch: int,
        stage: Stage,
        collates: Mapping[str, Collate],
        held_out: Spread,
        engine: Engine,
        ema: Ema | None,
        ranks: Ranks,
    ) -> None:
        """collates: see `Stage.validation_collates`. micro_batch: samples per rank and pass."""
        self.every = settings.every
        self.stage = stage
        self.engine = engine
        self.ema = ema
        self.ranks = ranks
        self.levels = list(collates)
        chosen = held_out.numbers(settings.samples)
        samples = len(chosen)
        if samples < len(self.levels):
            raise RunError(
                f"validation: {samples} samples for {len(self.levels)} levels; raise validation.samples, or name shards"
                " with more"
            )
        read = reader(held_out.dataset, chosen, stage.image_sizes, "validation.shards", held_out.buckets)
        self.passes: list[_Pass] = []
        for level, collate in enumerate(collates.values()):
            for numbers in held_out.alike(range(level, samples, len(self.levels)), chosen):
                for start in range(0, len(numbers), micro_batch * ranks.size):
                    everyone = numbers[start : start + micro_batch * ranks.size]
                    mine = everyone[ranks.rank :: ranks.size]
                    items = [read(number) for number in mine or everyone[:1]]
                    batch = Batch(collate(items), [item.key for item in items], [])
                    self.passes.append(_Pass(level, batch, counted=bool(mine)))

    def due(self, step: int) -> bool:
        """Whether to validate at `step`; the last step validates as well."""
        return step % self.every == 0

    def measure(self, progress: TrainState) -> dict[str, float | None]:
        """Metrics of the current weights; updates the best loss in `progress`."""
        begun = time.perf_counter()
        found = self._losses()
        metrics = {
            "val_loss": _mean(found),
            **{f"val_loss_{name}": v for name, v in zip(self.levels, found, strict=True)},
        }
        if self.ema is not None:
            with self.ema.applied(self.engine):
                metrics["val_loss_ema"] = _mean(self._losses())
        progress.validated(metrics.get("val_loss_ema", metrics["val_loss"]))
        return {name: finite(value) for name, value in metrics.items()} | {"validation_s": time.perf_counter() - begun}

    def _losses(self) -> list[float]:
        """Mean loss per level over the samples of all ranks."""
        sums = torch.zeros(len(self.levels), self.stage.sums, dtype=torch.float64, device=self.ranks.device)

        def forward() -> None:
            for level, batch, counted in self.passes:
                losses = self.engine.model(**on_device(batch, self.ranks.device), normalizer=1.0)
                if counted:
                    sums[level] += losses.sums

        self.engine.undisturbed(forward)
        total = iter(self.ranks.total(sums.flatten().tolist()))
        return [self.stage.mean_loss([next(total) for _ in range(self.stage.sums)]) for _ in self.levels]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def reader(
    dataset: Dataset, numbers: Sequence[int], sizes: tuple[int, ...], key: str, buckets: Buckets | None = None
) -> Callable[[int], Item]:
    """Place of a sample among those with these `numbers` in the dataset -> its item. key: of the dataset, for
    warnings."""
    found = ReadableSamples(dataset, sizes, buckets)

    def read(number: int) -> Item:
        replaced: list[tuple[str, str]] = []
        item = found.read(0, *dataset.place(numbers[number]), number, replaced)
        for name, reason in replaced:
            log.warning("%s: %s is unreadable (%s); %s takes its place", key, name, reason, item.key)
        return item

    return read
