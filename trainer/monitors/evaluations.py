"""Results of `bifrost eval` and `bifrost score`, stored in the run folder and mirrored to its trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import AlreadyRunning, RunError
from ..io import flat
from .metrics import MetricsFile

FILE = "evaluations.jsonl"
"""Separate from metrics.jsonl, which a trainer on another node may be writing."""


def note_evaluation(run: Path, step: int, figures: dict[str, Any]) -> str | None:
    """Store an evaluation of the checkpoint of `step` in the run folder, and send it to the trackers that have the run.

    Returns a line that describes a failure; None on success, or if `run` is an export.
    """
    if not (run / "metrics.jsonl").is_file():
        return None
    numbers = {key: float(value) for key, value in flat(figures, separator="/") if isinstance(value, (int, float))}
    MetricsFile(run / FILE).write({"event": "eval", "step": step, **numbers})
    from .trackers import TITLES, have
    from .tracking import sync

    failures = []
    for name in have(run):
        try:
            sync(run, [name])
        except AlreadyRunning:  # the run's own mirror is running and sends it
            pass
        except RunError as error:
            failures.append(
                f"the evaluation is not in {TITLES[name]} yet, `bifrost track sync {run} --to {name}` sends it: {error}"
            )
    return "; ".join(failures) or None
