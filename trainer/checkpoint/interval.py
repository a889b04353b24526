"""Checkpoint interval: the stall of each save against the work lost by a failure."""

from __future__ import annotations

import math

TOLERANCE = 1.25
"""The interval changes only if the best one differs by this factor."""


def best_interval(blocked_s: float, seconds: float, step_s: float, mtbf_s: float) -> int:
    """Steps between saves that minimise the expected time lost.

    Each save blocks training for `blocked_s`; a failure, every `mtbf_s` for the whole run, loses half an interval. The
    sum is minimal at sqrt(2 x blocked_s x mtbf_s) (Young, 1974). A save takes `seconds` in the background and should
    run at most half of the time.
    """
    return max(1, round(max(math.sqrt(2 * blocked_s * mtbf_s), 2 * seconds) / step_s))


def settled(now: int, best: int) -> int:
    """`best`, or the current interval `now` if the two are close: it should not change with every measurement."""
    return now if now / TOLERANCE <= best <= now * TOLERANCE else best
