"""Exponential moving average of the trainable weights, on each rank's fp32 slices: nothing is gathered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor

from .engine import Engine


class Ema:
    """average = d average + (1 - d) master, after every applied step; d = min(decay, (1 + n) / (10 + n)) at the n-th.

    The warm-up, as in diffusers' EMAModel, forgets the initial weights: without it their share after n steps is
    decay^n, which for a ControlNet means zeros in its output projections.

    statistics: buffers that belong to the weights, such as BatchNorm's running mean and variance. Averaged weights have
    other activations than the live ones, so the statistics are averaged too; a counter is copied.
    """

    def __init__(
        self, masters: Mapping[str, Tensor], decay: float, statistics: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        self.decay = decay
        self.updates = 0
        self.slices = {name: master.detach().clone() for name, master in masters.items()}
        self.statistics = {name: buffer.detach().clone() for name, buffer in statistics.items()}

    @torch.no_grad()
    def update(self, masters: Mapping[str, Tensor], statistics: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Move towards `masters` and `statistics`, the same slices and buffers as at construction."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, average in self.slices.items():
            average.lerp_(masters[name], 1 - decay)
        for name, average in self.statistics.items():
            if average.is_floating_point():
                average.lerp_(statistics[name], 1 - decay)
            else:
                average.copy_(statistics[name])

    @contextmanager
    def applied(self, engine: Engine) -> Iterator[None]:
        """Within it, the engine's model has the averaged weights and statistics; every rank enters it. The live ones
        are restored bit by bit; masters and moments are not touched."""
        live = engine.slices()
        pairs = [(live[name], average) for name, average in self.slices.items()]
        pairs += [(buffer, self.statistics[name]) for name, buffer in engine.model.statistics().items()]
        kept = [tensor.clone() for tensor, _ in pairs]
        try:
            for tensor, average in pairs:
                tensor.copy_(average)
            engine.refresh()
            yield
        finally:
            for (tensor, _), before in zip(pairs, kept, strict=True):
                tensor.copy_(before)
            engine.refresh()
