"""Results of `bifrost eval`, stored in the run folder and mirrored to MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import AlreadyRunning, RunError
from .metrics import MetricsFile

FILE = "evaluations.jsonl"
"""Separate from metrics.jsonl, which a trainer on another node may be writing."""


def note_evaluation(run: Path, step: int, figures: dict[str, Any]) -> str | None:
    """Store an evaluation of the checkpoint of `step` in the run folder, and send it to MLflow if the run is mirrored.

    Returns a line that describes a failure; None on success, or if `run` is an export.
    """
    if not (run / "metrics.jsonl").is_file():
        return None
    numbers = dict(_numbers(figures))
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


def _numbers(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        name = f"{path}/{key}" if path else str(key)
        if isinstance(value, dict):
            yield from _numbers(value, name)
        elif isinstance(value, (int, float)):
            yield name, float(value)
