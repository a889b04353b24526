"""Exponential moving average of the trainable weights, on each rank's fp32 slices: nothing is gathered."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """average = decay * average + (1 - decay) * master, after every applied step."""

    def __init__(self, masters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.slices = {name: master.detach().clone() for name, master in masters.items()}

    @torch.no_grad()
    def update(self, masters: Mapping[str, Tensor]) -> None:
        """Move towards `masters`, the same slices as at construction."""
        for name, average in self.slices.items():
            average.lerp_(masters[name], 1 - self.decay)
