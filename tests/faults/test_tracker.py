"""A real MLflow server that is stopped and then killed during a run: no step waits, no line is lost, and
`bifrost track sync` sends the missing lines."""

import os
import signal
import statistics
import time
from pathlib import Path

import pytest

import mlflow_server
import ranked
import runs
import small_model
from bifrost.slurm.exit_codes import STOPPED

pytestmark = [pytest.mark.multi, pytest.mark.slow]
STEPS = 8


def test_server_that_hangs_and_then_dies(shards: Path, tmp_path: Path) -> None:
    server = mlflow_server.Server(tmp_path)
    server.start()
    settings = ["steps=100000", "tracking.enabled=true", f"tracking.uri={server.uri}"]
    arguments = runs.arguments(shards, tmp_path, *settings, *small_model.settings(tmp_path / "backbone"))
    run, folder = tmp_path / "tiny-mllm", tmp_path / "ranks"
    folder.mkdir()
    processes = ranked.start(ranked.command, 2, arguments, folder=folder)
    windows = {}

    def phase(name: str, seconds: float) -> None:
        """Wait for STEPS steps and at least `seconds`, in which the mirror, which polls every second, sends lines."""
        before, begun = len(runs.steps(run)), time.time()
        while len(runs.steps(run)) < before + STEPS or time.time() < begun + seconds:
            assert time.time() < begun + 240 and all(process.is_alive() for process in processes)
            time.sleep(0.1)
        windows[name] = (begun, time.time())

    wait_for(lambda: (run / "tracking.json").exists() and (run / "metrics.jsonl").exists())
    phase("well", 3)
    server.signal(signal.SIGSTOP)
    phase("hanging", 6)
    server.kill()
    phase("dead", 6)
    wait_for(lambda: "not sent" in (run / "logs" / "tracking.log").read_text())
    os.kill(processes[0].pid, signal.SIGTERM)
    ended = ranked.finish(processes, folder)
    assert [rank.code for rank in ended] == [STOPPED] * 2, ended[0].err

    lines = runs.steps(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    times = {name: [line["step_s"] for line in lines if a < line["time"] < b] for name, (a, b) in windows.items()}
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    print("median step:", {name: f"{seconds:.3f} s" for name, seconds in median.items()})
    # A step that waited for a request would take its 10 s. Not a ratio: other load slows the short steps.
    assert max(median["hanging"], median["dead"]) < median["well"] + 1
    assert max(times["hanging"] + times["dead"]) < 10

    server.start()
    assert ranked.bifrost(1, "track", "sync", str(run))[0].code == 0
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    (found,) = client.search_runs([client.get_experiment_by_name("bifrost").experiment_id])
    sent = sorted((point.step, point.value) for point in client.get_metric_history(found.info.run_id, "train/loss"))
    assert sent == [(line["step"], line["loss"]) for line in lines]
    assert found.info.status == "KILLED"
    server.kill()


def wait_for(true) -> None:
    limit = time.monotonic() + 120
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.1)
