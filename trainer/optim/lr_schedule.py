"""The learning rate, a pure function of the step."""

from __future__ import annotations

import math

from ...recipes.schema import Optimizer


def learning_rate(optimizer: Optimizer, steps: int, step: int) -> float:
    """Rate of step `step` (0-based) of `steps`: linear warm-up to the peak, then constant or half a cosine to zero."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    done = (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps)
    return optimizer.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
