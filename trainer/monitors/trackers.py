"""The trackers that runs are mirrored to: which ones a recipe names, and what they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import RunError
from ..versions import installed
from . import mlflow_errors, tracker_errors

TITLES = {"mlflow": "MLflow", "tensorboard": "TensorBoard", "wandb": "W&B", "prometheus": "Prometheus"}
"""Tracker, as `tracking.to` names it, or `prometheus` -> its name in messages."""
PACKAGES = {"mlflow": "mlflow", "tensorboard": "tensorboard", "wandb": "wandb", "prometheus": "prometheus-client"}
TRACES = {"mlflow": "tracking.json", "tensorboard": "tensorboard", "wandb": "wandb.json"}
"""Tracker that keeps a history -> what is in the folder of a run that was sent to it."""


class Tracker(Protocol):
    """A run's record in a tracker. Its constructor takes the run folder and whether the run is training now."""

    server: str
    """Its place, for messages."""
    sent: int
    """Points sent by this object."""
    file_error: str | None
    """Why files were not sent, if points were."""

    def push(self, last: bool) -> None:
        """Send what is new. last: the run has ended. After an error, the next call continues without losing or
        repeating a point."""

    def end(self, otherwise: str | None) -> None:
        """Set the final status from the newest `end` event unless the run was restarted since, else to `otherwise`,
        an outcome, if not None."""

    def address(self) -> str:
        """Where the user finds it, once something was sent."""
        ...

    def close(self) -> None:
        """Let other processes send the run."""


def open_tracker(name: str, run_dir: Path, live: bool) -> Tracker:
    """The record of a run in the tracker `name`. Raises RunError and OSError."""
    if name == "mlflow":
        from .mlflow_run import MlflowRun

        return MlflowRun(run_dir, live)
    if name == "tensorboard":
        from .tensorboard_log import TensorboardLog

        return TensorboardLog(run_dir, live)
    if name == "wandb":
        from .wandb_run import WandbRun

        return WandbRun(run_dir, live)
    from .prometheus_file import PrometheusFile

    return PrometheusFile(run_dir, live)


def explain(name: str, error: Exception, place: str) -> tuple[str, bool]:
    """(one line, whether a retry is useless until the user acts) for an error of the tracker `name`."""
    return (mlflow_errors if name == "mlflow" else tracker_errors).explain(error, place)


def named_in(recipe: Mapping[str, Any]) -> list[str]:
    """The trackers of a stored recipe; those of earlier versions name none."""
    return list((recipe.get("tracking") or {}).get("to", ["mlflow"]))


def have(run_dir: Path) -> list[str]:
    """The trackers that a run was sent to."""
    return [name for name, trace in TRACES.items() if (run_dir / trace).exists()]


def chosen(to: Sequence[str], prometheus: str | None) -> list[str]:
    """The trackers of a run that is mirrored, by its settings."""
    return [*to, "prometheus"] if prometheus else list(to)


def require_installed(names: Sequence[str]) -> None:
    """Raise RunError for the first of these trackers whose package is not installed. A run without MLflow, which is the
    default, trains without it."""
    for name in names:
        setting = "tracking.prometheus" if name == "prometheus" else f"tracking.to={name}"
        if name != "mlflow" and not has_package(name):
            raise RunError(f"{setting}: {PACKAGES[name]} is not installed: pip install {PACKAGES[name]}, or unset it")


def has_package(name: str) -> bool:
    """Whether the package of a tracker is installed."""
    return installed(PACKAGES[name].replace("-", "_"))


def remedy(name: str, run_dir: Path) -> str:
    """How to send later what a mirror could not; empty for Prometheus, which has no history."""
    return f"; `bifrost track sync {run_dir}` sends it" if name in TRACES else ""
