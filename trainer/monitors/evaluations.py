"""Results of `bifrost eval` and `bifrost score`, stored in the run folder and mirrored to MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import AlreadyRunning, RunError
from ..io import flat
from .metrics import MetricsFile

FILE = "evaluations.jsonl"
"""Separate from metrics.jsonl, which a trainer on another node may be writing."""


def note_evaluation(run: Path, step: int, figures: dict[str, Any]) -> str | None:
    """Store an evaluation of the checkpoint of `step` in the run folder, and send it to MLflow if the run is mirrored.

    Returns a line that describes a failure; None on success, or if `run` is an export.
    """
    if not (run / "metrics.jsonl").is_file():
        return None
    numbers = {key: float(value) for key, value in flat(figures, separator="/") if isinstance(value, (int, float))}
    MetricsFile(run / FILE).write({"event": "eval", "step": step, **numbers})
    if not (run / "tracking.json").is_file():
        return None
    from .tracking import sync

    try:
        sync(run)
    except AlreadyRunning:
        return None  # the run's own mirror is running and sends it
    except RunError as error:
        return f"the evaluation is not in MLflow yet, `bifrost track sync {run}` sends it: {error}"
    return None
