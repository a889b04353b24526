"""Step health: which steps must be skipped, and whether too many were skipped consecutively.

A spike is detected by the modified z-score, 0.6745 (x - median) / MAD, where MAD is the median absolute deviation
(Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993); the factor 0.6745 makes it equal the usual z-score for
normally distributed values. Median and MAD are robust while less than half of the window are outliers, and values of
skipped steps never enter the window.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...recipes.schema import Health as Settings
from ..optim.train_state import TrainState
from .metrics import finite

FLOOR = 0.02
"""Minimum MAD as a fraction of the median: in a window of nearly equal values a small change is not a spike."""


def robust_zscore(value: float, window: Sequence[float]) -> float:
    """Modified z-score of `value` among the finite values of `window`, which are not empty."""
    median = statistics.median(window)
    deviation = statistics.median(abs(each - median) for each in window)
    return 0.6745 * (value - median) / max(deviation, FLOOR * abs(median), sys.float_info.min)


@dataclass
class Health:
    """Checks every step by its loss and gradient norm. Its state is in `progress`, so a resume behaves the same.

    Inputs are bitwise equal on all ranks, and so are the decisions.
    """

    settings: Settings
    progress: TrainState

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why the step with these values must be skipped; None if it is healthy."""
        values = {"loss": loss, "gradient norm": grad_norm}
        for name, value in values.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        limit, accepted = self.settings.spike_zscore, self.progress.accepted
        if limit is None or 2 * len(accepted) < self.settings.window:
            return None
        for (name, value), window in zip(values.items(), zip(*accepted, strict=True), strict=True):
            score = robust_zscore(value, window)
            if score > limit:
                median = statistics.median(window)
                return f"{name} {value:.4g} is a spike: z-score {score:.1f}, median {median:.4g} of {len(window)} steps"
        return None

    def record(self, skipped: bool, loss: float, grad_norm: float) -> None:
        """Record the outcome of a step."""
        progress = self.progress
        if not skipped:
            progress.bad_in_a_row = progress.spikes_in_a_row = 0
            progress.accepted = [*progress.accepted, [loss, grad_norm]][-self.settings.window :]
            return
        progress.skipped_steps += 1
        progress.bad_in_a_row += 1
        progress.spikes_in_a_row += math.isfinite(loss) and math.isfinite(grad_norm)

    @property
    def exhausted(self) -> bool:
        """Whether max_bad_steps consecutive steps were skipped."""
        return self.progress.bad_in_a_row >= self.settings.max_bad_steps


def skipped_event(
    progress: TrainState,
    reason: str,
    loss: float,
    grad_norm: float,
    shares: Sequence[tuple[list[str], list[float], float]],
) -> dict[str, Any]:
    """Event of a skipped step. shares: every rank's sample keys, their losses, and the sum over its passes."""
    return {
        "event": "skipped_step",
        "step": progress.step,
        "batch": progress.batch,
        "reason": reason,
        "loss": finite(loss),
        "grad_norm": finite(grad_norm),
        "rank_losses": [finite(total) for _, _, total in shares],
        "samples": [[key, finite(each)] for keys, losses, _ in shares for key, each in zip(keys, losses, strict=True)],
    }
