"""Exponential moving average of the trainable weights, on each rank's fp32 slices: nothing is gathered."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """average = d average + (1 - d) master, after every applied step; d = min(decay, (1 + n) / (10 + n)) at the n-th.

    The warm-up, as in diffusers' EMAModel, lets go of the initial weights: without it their share after n steps is
    decay^n, which for a ControlNet means zeros where it meets FLUX.
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.slices = {name: master.detach().clone() for name, master in masters.items()}

    @torch.no_grad()
    def update(self, masters: Mapping[str, Tensor]) -> None:
        """Move towards `masters`, the same slices as at construction."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, average in self.slices.items():
            average.lerp_(masters[name], 1 - decay)
