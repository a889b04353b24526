"""Captions that are longer than the text model's limit: reported once per attempt, with the limit's setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...data.units import counted


class TruncationNotice:
    """Reports the first step of an attempt with truncated captions; metric lines have the number of each step.

    limit: as of `Stage.text_limit`. write: an event, on all ranks alike. say: a line on the console.
    """

    def __init__(self, limit: str, write: Callable[[dict[str, Any]], None], say: Callable[[str], None]) -> None:
        self.limit, self.write, self.say = limit, write, say
        self.reported = False

    def add(self, step: int, metrics: Mapping[str, float], global_batch: int) -> None:
        """metrics: of `step`, as of `Stage.report`."""
        truncated = round(metrics.get("captions_truncated", 0))
        if self.reported or not truncated:
            return
        self.reported = True
        self.write({"event": "captions_truncated", "step": step, "captions": truncated, "limit": self.limit})
        self.say(
            f"warning: step {step}: {truncated:,} of {counted(global_batch, 'caption')} are longer than {self.limit}:"
            " their ends are not read; metrics have captions_truncated of every logged step"
        )
