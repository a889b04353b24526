"""Skipped steps: counted, and after too many in a row the run ends with the reason."""

from __future__ import annotations

from ..errors import Unhealthy


class Health:
    """skipped: steps without an update in the whole run; in_a_row: up to now."""

    def __init__(self, max_bad_steps: int, skipped: int = 0, in_a_row: int = 0) -> None:
        self.max_bad_steps = max_bad_steps
        self.skipped = skipped
        self.in_a_row = in_a_row

    def record(self, step: int, applied: bool, loss: float) -> None:
        """Note whether step `step` changed the weights. Raises Unhealthy at `max_bad_steps` in a row."""
        if applied:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.max_bad_steps:
            raise Unhealthy(
                f"step {step}: {self.in_a_row} steps in a row were skipped for a non-finite loss ({loss}) or gradient;"
                " the newest checkpoint is from before them: lower optimizer.lr or look at these steps' samples"
            )
