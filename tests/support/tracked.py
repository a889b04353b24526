"""Runs whose metrics are mirrored to MLflow: what they log and what arrives."""

from __future__ import annotations

import json
import time


def log_steps(run, steps, scale=1.0):
    for step in steps:
        run.metrics.write({"step": step, "samples": 64 * step, "loss": scale / step})


def run_id(run):
    return json.loads((run.folder / "tracking.json").read_text())["run_id"]


def history(client, run, key):
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id(run), key))


def log_text(run):
    return (run.folder / "logs" / "tracking.log").read_text()


def wait_until(true, seconds=20):
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.1)
