"""Runs whose metrics are mirrored: what they log and what arrives."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bifrost.trainer.monitors.series import series


def log_steps(run, steps, scale=1.0):
    for step in steps:
        run.metrics.write({"step": step, "samples": 64 * step, "loss": scale / step})


def run_id(run):
    return json.loads((run.folder / "tracking.json").read_text())["run_id"]


def history(client, run, key):
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id(run), key))


def log_text(run):
    return (run.folder / "logs" / "tracking.log").read_text()


def train_until_killed(run, tracker):
    """A process that mirrors the run to `tracker`, logs steps 10 and 20, and is ended by SIGKILL."""
    script = (
        "import os, signal, sys; from bifrost.trainer.monitors.metrics import MetricsFile;"
        "from bifrost.trainer.monitors.tracking import start_mirror; start_mirror(sys.argv[1], [sys.argv[2]]);"
        "metrics = MetricsFile(sys.argv[1] + '/metrics.jsonl');"
        "[metrics.write({'step': step, 'loss': 1 / step}) for step in (10, 20)]; os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", script, run.folder, tracker], check=False)
    assert ended.returncode == -signal.SIGKILL


def wait_until(true, seconds=60):
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.1)


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Series -> (step, value) of each point in a run's metrics and evaluations, in the order of steps."""
    found: dict[str, list[tuple[int, float]]] = {}
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        text = (folder / name).read_text() if (folder / name).exists() else ""
        for record in map(json.loads, text.splitlines()):
            for key, value in series(record):
                found.setdefault(key, []).append((record["step"], value))
    return {key: sorted(points, key=lambda point: point[0]) for key, points in found.items()}


def accumulator(folder: Path) -> Any:
    """TensorBoard's own reader of a run's event files, without its limits on the number of points."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})


def scalars(events: Any) -> dict[str, list[tuple[int, float]]]:
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's only offline folder, by W&B's own reader."""
    (found,) = (each for each in (folder / "wandb").glob("offline-run-*"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(found)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in ended.stdout.splitlines()]


def wandb_points(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Series -> (step, value), in the order of steps."""
    found: dict[str, list[tuple[int, float]]] = {}
    for item in (record["history"]["item"] for record in records if record["type"] == "history"):
        for key, value in item.items():
            if not key.startswith(("_", "previews")) and key != "step":
                found.setdefault(key, []).append((item["step"], float(value)))
    return {key: sorted(points, key=lambda point: point[0]) for key, points in found.items()}


def as_fp32(points: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard keeps of the values."""
    return {key: [(step, float(np.float32(value))) for step, value in each] for key, each in points.items()}
