"""Goodput: sums computed by hand, and over real attempts that are killed and resumed."""

import json
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ranked
import runs
from bifrost.trainer.cli.main import app
from bifrost.trainer.monitors.goodput import FILE, AccountedMetrics, summary

START = 1000.0


def line(at: float, step: int, step_s: float, data_wait_s: float = 0.0) -> dict:
    return {"time": START + at, "step": step, "step_s": step_s, "data_wait_s": data_wait_s}


def event(at: float, kind: str, step: int, **rest: float) -> dict:
    return {"time": START + at, "event": kind, "step": step, **rest}


def went(metrics: AccountedMetrics, step: int, begun: float, ready: float, owner: dict | None = None) -> dict:
    """Resume after `step` with a process that started and was ready at these times; returns the event."""
    past = metrics.resume(step, START + begun, owner)
    record = event(ready, "start", step, startup_s=ready - begun, **past)
    metrics.write(record)
    return record


def test_the_sums(tmp_path: Path) -> None:
    metrics = AccountedMetrics(tmp_path / "metrics.jsonl")
    went(metrics, 0, 0, 20)
    metrics.write(line(40, 10, step_s=2.0, data_wait_s=0.5))
    metrics.write(event(44, "checkpoint", 10, seconds=4.0))
    metrics.write(line(64, 20, step_s=2.0))
    # Killed at 76 while at step 25; the next process begins at 100 and is ready at 130.
    owner = {"beat": START + 75, "step": 25, "started": START + 1}
    start = went(metrics, 10, 100, 130, owner)
    assert [record["step"] for record in map(json.loads, (tmp_path / "metrics.jsonl").open())] == [0, 10, 10, 10]
    assert start["lost_steps"] == 15 and start["lost_s"] == pytest.approx(75 - 40 - 4) and start["kept_s"] == 0
    assert start["downtime_s"] == pytest.approx(25)
    metrics.write(line(152, 20, step_s=2.2))
    metrics.write(event(160, "end", 20, outcome="finished"))
    found = summary(tmp_path)
    seconds = found["seconds"]
    assert seconds == pytest.approx(
        {"step": 15 + 22, "data_wait": 5, "startup": 20, "recovery": 55, "save": 4, "lost": 31, "other": 8}
    )
    assert found["wall_s"] == pytest.approx(160) == sum(seconds.values())
    assert found["ettr"] == pytest.approx(37 / 160)
    assert (found["attempts"], found["step"], found["lost_steps"]) == (2, 20, 15)


def test_steps_without_a_line(tmp_path: Path) -> None:
    """A save between two lines: of what came after the last line, a part counts and the rest is lost."""
    metrics = AccountedMetrics(tmp_path / "metrics.jsonl")
    went(metrics, 0, 0, 10)
    metrics.write(event(61, "checkpoint", 5, seconds=1.0))
    start = went(metrics, 5, 100, 110, {"beat": START + 91, "step": 8, "started": START})
    assert start["kept_s"] == pytest.approx(50) and start["lost_s"] == pytest.approx(30) and start["lost_steps"] == 3
    # Stopped by a signal: nothing is lost, though the last steps were not logged.
    metrics.write(line(130, 7, step_s=10))
    metrics.write(event(150, "checkpoint", 9, seconds=0.0))
    metrics.write(event(150, "end", 9, outcome="stopped"))
    start = went(metrics, 9, 160, 165)
    assert (start["kept_s"], start["lost_s"], start["lost_steps"], start["downtime_s"]) == pytest.approx((20, 0, 0, 10))
    assert summary(tmp_path)["seconds"]["step"] == pytest.approx(50 + 20 + 20)


def test_an_attempt_without_a_step_is_recovery(tmp_path: Path) -> None:
    metrics = AccountedMetrics(tmp_path / "metrics.jsonl")
    went(metrics, 0, 0, 10)
    metrics.write(line(20, 1, step_s=10))
    start = went(metrics, 1, 90, 100, {"beat": START + 80, "step": 0, "started": START + 40})
    assert start["downtime_s"] == pytest.approx(70) and start["lost_s"] == 0 and start["kept_s"] == 0


def test_a_roll_back(tmp_path: Path) -> None:
    """Back from step 4 to step 2 in the same process: what came after step 2 is lost, once."""
    metrics = AccountedMetrics(tmp_path / "metrics.jsonl")
    went(metrics, 0, 0, 10)
    for step in range(1, 5):
        metrics.write(line(10 + 5 * step, step, step_s=5))
    past = metrics.resume(2, START + 32, None)
    assert past == {"downtime_s": pytest.approx(2), "kept_s": 0, "lost_s": pytest.approx(10), "lost_steps": 2}
    metrics.write({**event(34, "rollback", 4, to=2), **past})
    metrics.write(line(40, 3, step_s=6))
    found = summary(tmp_path)
    assert found["seconds"]["step"] == pytest.approx(10 + 6) and found["seconds"]["lost"] == pytest.approx(10)
    went(metrics, 3, 50, 60)
    assert summary(tmp_path)["lost_steps"] == 2


def test_more_steps_for_a_finished_run(tmp_path: Path) -> None:
    """The days until somebody asks for more of a finished run are nobody's loss."""
    metrics = AccountedMetrics(tmp_path / "metrics.jsonl")
    went(metrics, 0, 0, 10)
    metrics.write(line(20, 1, step_s=10))
    metrics.write(event(20, "end", 1, outcome="finished"))
    went(metrics, 1, 90_000, 90_010)
    metrics.write(line(90_020, 2, step_s=10))
    found = summary(tmp_path)
    assert found["wall_s"] == pytest.approx(40) and found["ettr"] == pytest.approx(0.5)
    assert found["seconds"]["recovery"] == 0


def test_no_line_of_the_file_is_needed_twice(tmp_path: Path) -> None:
    """The running totals of the process equal those computed from the file."""
    metrics = AccountedMetrics(tmp_path / "metrics.jsonl")
    went(metrics, 0, 0, 20)
    for step in range(1, 6):
        metrics.write(line(20 + step, step, step_s=1.0))
        written = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
        assert written["ettr"] == pytest.approx(step / (20 + step))
    metrics.store()
    assert json.loads((tmp_path / FILE).read_text()) == summary(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, "metrics.jsonl"]


@pytest.mark.multi
def test_a_run_that_is_killed_and_resumed(shards: Path, tmp_path: Path) -> None:
    arguments = runs.arguments(shards, tmp_path, "steps=4000", "checkpoint.every=5", "log_every=2")
    run = tmp_path / "tiny-mllm"
    folder = tmp_path / "rendezvous"
    folder.mkdir()
    begun = time.time()
    processes = ranked.start(ranked.command, 2, arguments, folder=folder)
    runs.wait_for_steps(run, 4)
    for process in processes:
        process.kill()
    assert [rank.code for rank in ranked.finish(processes, folder)] == [-signal.SIGKILL] * 2
    done = runs.steps(run)[-1]["step"]
    saved = runs.events(run, "checkpoint")[-1]["step"]
    time.sleep(1.5)  # downtime
    ended = ranked.bifrost(2, *arguments, f"steps={saved + 3}")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert "taken over from process" in ended[0].err and "its process is gone" in ended[0].err
    start = runs.events(run, "start")[-1]
    assert start["step"] == saved and start["lost_steps"] >= done - saved and start["downtime_s"] > 0
    result = CliRunner().invoke(app, ["goodput", str(run), "--json"])
    found = json.loads(result.output)
    assert found["attempts"] == 2 and found["lost_steps"] == start["lost_steps"]
    assert found["wall_s"] == pytest.approx(sum(found["seconds"].values()), rel=1e-6)
    lines = runs.lines(run)
    # The start of a process is known to the second that the machine booted in.
    assert lines[-1]["time"] - lines[0]["time"] < found["wall_s"] < time.time() - begun + 1
    assert all(seconds >= 0 for seconds in found["seconds"].values()) and found["seconds"]["step"] > 0
    assert json.loads((run / FILE).read_text()) == found
    table = CliRunner().invoke(app, ["goodput", str(run)]).output
    assert "2 attempts" in table and f"{found['ettr']:.1%}" in table


def test_no_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["goodput", str(tmp_path)])
    assert "it has no metrics.jsonl" in str(result.exception)
