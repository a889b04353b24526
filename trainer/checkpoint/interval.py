"""How often to save: a stall at every save against the work that a failure loses."""

from __future__ import annotations

import math

TOLERANCE = 1.25
"""An interval is kept until another is better by this factor."""


def best_interval(blocked_s: float, seconds: float, step_s: float, mtbf_s: float) -> int:
    """Steps between saves that lose least time in the long run.

    A save blocks training for `blocked_s`, a failure every `mtbf_s` of the whole run loses half an interval: the sum is
    least at sqrt(2 x blocked_s x mtbf_s) (Young, 1974). A save takes `seconds` in the background and should be under
    way at most half of the time.
    """
    return max(1, round(max(math.sqrt(2 * blocked_s * mtbf_s), 2 * seconds) / step_s))


def settled(now: int, best: int) -> int:
    """`best`, or the interval of `now` where that is about as good: it should not change with every measurement."""
    return now if now / TOLERANCE <= best <= now * TOLERANCE else best
