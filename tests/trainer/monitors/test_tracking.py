import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bifrost.trainer.errors import RunError
from bifrost.trainer.monitors import mlflow_run
from bifrost.trainer.monitors.mlflow_run import MlflowRun
from bifrost.trainer.monitors.track_cli import app
from bifrost.trainer.monitors.tracking import start_mirror, sync


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


def test_a_run_arrives_whole(server, client, make_run):
    run = make_run(server)
    (run.folder / "samples" / "step-20").mkdir(parents=True)
    (run.folder / "samples" / "step-20" / "a.png").write_bytes(b"image")
    mirror = start_mirror(run.folder)
    run.metrics.write({"event": "start", "step": 0, "ranks": 2})
    log_steps(run, (10, 20))
    run.metrics.write({"step": 30, "loss": math.nan, "time": 1700000000.5, "note": "text", "flag": True})
    run.metrics.write({"event": "evaluation", "step": 30, "fid": 7.5})
    run.metrics.write({"event": "end", "step": 30, "outcome": "finished"})
    assert mirror.finish(30)

    assert history(client, run, "samples") == [(10, 640), (20, 1280)]
    assert history(client, run, "evaluation/fid") == [(30, 7.5)]
    losses = history(client, run, "loss")
    assert losses[:2] == [(10, 0.1), (20, 0.05)]
    assert math.isnan(losses[2][1])
    assert min(p.timestamp for p in client.get_metric_history(run_id(run), "loss")) == 1700000000500
    found = client.get_run(run_id(run))
    assert set(found.data.metrics) == {"samples", "loss", "start/ranks", "evaluation/fid"}
    assert found.data.params["optimizer.betas"] == "[0.9, 0.95]"
    assert found.data.params["name"] == "demo"
    assert found.data.tags["bifrost.restarts"] == "0"
    assert (found.info.status, found.info.run_name) == ("FINISHED", "demo")
    assert {file.path for file in client.list_artifacts(run_id(run))} == {"recipe.yaml", "samples", "events.jsonl"}
    assert [file.path for file in client.list_artifacts(run_id(run), "samples/step-20")] == ["samples/step-20/a.png"]
    events = Path(client.download_artifacts(run_id(run), "events.jsonl")).read_text()
    assert [json.loads(line)["event"] for line in events.splitlines()] == ["start", "evaluation", "end"]


def test_a_resume_that_repeats_steps(server, client, make_run):
    run = make_run(server)
    mirror = start_mirror(run.folder)
    log_steps(run, (10, 20, 30))
    run.metrics.write({"event": "end", "step": 30, "outcome": "stopped"})
    assert mirror.finish(30)
    first = run_id(run)
    assert client.get_run(first).info.status == "KILLED"

    run.metrics.rewind(10)
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.1", "lr: 0.2") + "added: 1\n")
    mirror = start_mirror(run.folder)
    log_steps(run, (20, 30, 40), scale=2.0)
    wait_until(lambda: client.get_run(first).info.status == "RUNNING")
    run.metrics.write({"event": "end", "step": 40, "outcome": "finished"})
    assert mirror.finish(30)

    assert run_id(run) == first
    assert history(client, run, "loss") == [(10, 0.1), (20, 0.05), (30, pytest.approx(1 / 30)), (40, 0.05)]
    found = client.get_run(first)
    assert found.data.tags["bifrost.restarts"] == "1"
    assert (found.data.params["optimizer.lr"], found.data.params["added"]) == ("0.1", "1")
    assert found.info.status == "FINISHED"
    assert sync(run.folder) == 0


def test_a_killed_trainer_leaves_a_mirror_that_sends_the_rest(server, client, make_run):
    run = make_run(server)
    script = (
        "import os, signal, sys; from bifrost.trainer.monitors.metrics import MetricsFile;"
        "from bifrost.trainer.monitors.tracking import start_mirror; start_mirror(sys.argv[1]);"
        "metrics = MetricsFile(sys.argv[1] + '/metrics.jsonl');"
        "[metrics.write({'step': step, 'loss': 1 / step}) for step in (10, 20)]; os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, run.folder], check=False).returncode == -signal.SIGKILL
    wait_until(lambda: (run.folder / "tracking.json").exists() and run_id(run))
    wait_until(lambda: client.get_run(run_id(run)).info.status == "FAILED")
    assert history(client, run, "loss") == [(10, 0.1), (20, 0.05)]


def test_stop_signals_leave_the_mirror_at_work_and_it_is_polite(server, client, make_run):
    run = make_run(server)
    mirror = start_mirror(run.folder)
    wait_until(lambda: (run.folder / "tracking.json").exists() and run_id(run))
    assert os.getpriority(os.PRIO_PROCESS, mirror.process.pid) >= 10
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(mirror.process.pid, number)
    with pytest.raises(RunError, match="is being sent by another process, its mirror"):
        sync(run.folder)
    log_steps(run, (10,))
    assert mirror.finish(30)
    assert history(client, run, "loss") == [(10, 0.1)]


@pytest.mark.parametrize("hanging", [True, False])
def test_a_server_that_is_away_costs_training_nothing(server, client, door, make_run, hanging):
    run = make_run(door.uri)
    if hanging:
        door.hang()
    begin = time.monotonic()
    mirror = start_mirror(run.folder)
    assert time.monotonic() - begin < 1
    log_steps(run, (10,))
    wait_until(lambda: door.held if hanging else "not sent" in log_text(run))
    begin = time.monotonic()
    log_steps(run, (20, 30))
    assert time.monotonic() - begin < 0.5
    run.metrics.write({"event": "end", "step": 30, "outcome": "finished"})
    begin = time.monotonic()
    assert not mirror.finish(1)
    assert time.monotonic() - begin < 3
    assert log_text(run).count("not sent") == (0 if hanging else 1)

    door.open_to(server)
    result = CliRunner().invoke(app, ["sync", str(run.folder)])
    assert f"{run.folder}: 6 points sent" in result.output
    assert history(client, run, "loss") == [(10, 0.1), (20, 0.05), (30, pytest.approx(1 / 30))]
    assert client.get_run(run_id(run)).info.status == "FINISHED"


def test_a_mirror_finds_its_server_again_by_itself(server, client, door, make_run):
    run = make_run(door.uri)
    mirror = start_mirror(run.folder)
    log_steps(run, (10, 20))
    wait_until(lambda: "not sent" in log_text(run))
    door.open_to(server)
    log_steps(run, (30,))
    assert mirror.finish(30)  # does not sit out its wait
    assert [step for step, _ in history(client, run, "loss")] == [10, 20, 30]


def test_sync_says_what_is_wrong(door, make_run):
    run = make_run(door.uri)
    log_steps(run, (10,))
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("http://", "http://user:secret@"))
    with pytest.raises(RunError, match=rf"demo could not be sent to MLflow: \w+: .*{door.uri}.*; try again") as error:
        sync(run.folder)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("arrived", [True, False])
def test_a_batch_of_unknown_fate_is_neither_lost_nor_repeated(server, client, make_run, monkeypatch, arrived):
    monkeypatch.setattr(mlflow_run, "POINTS", 4)
    run = make_run(server)
    log_steps(run, (10, 20, 30, 40))
    target = MlflowRun(run.folder, live=True)
    target.push(last=False)
    log_steps(run, (50, 60, 70, 80))
    real, calls = type(target._client).log_batch, []

    def failing(self, *args, **options):
        calls.append(1)
        if len(calls) == 2:
            if arrived:
                real(self, *args, **options)
            raise TimeoutError
        real(self, *args, **options)

    monkeypatch.setattr(type(target._client), "log_batch", failing)
    with pytest.raises(TimeoutError):
        target.push(last=False)
    target.push(last=False)
    assert [step for step, _ in history(client, run, "loss")] == list(range(10, 90, 10))
    assert len(calls) == 2 + (not arrived)


def test_a_run_whose_creation_was_not_heard_of_is_found(server, client, make_run):
    run = make_run(server)
    MlflowRun(run.folder, live=True).push(last=True)
    first = run_id(run)
    state = json.loads((run.folder / "tracking.json").read_text())
    (run.folder / "tracking.json").write_text(json.dumps({**state, "run_id": None}))
    sync(run.folder)
    assert run_id(run) == first


def test_files_that_are_refused_do_not_hold_up_points(server, client, make_run, monkeypatch):
    run = make_run(server)
    log_steps(run, (10,))
    from mlflow import MlflowClient

    def refuse(*_):
        raise PermissionError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", refuse)
        with pytest.raises(RunError, match=r"has every point of .* but not its files: PermissionError: no room"):
            sync(run.folder)
    assert history(client, run, "loss") == [(10, 0.1)]
    assert sync(run.folder) == 0
    assert [file.path for file in client.list_artifacts(run_id(run))] == ["recipe.yaml"]


def test_the_default_store_lies_beside_the_run(make_run):
    run = make_run()
    log_steps(run, (10,))
    assert sync(run.folder) == 2
    from mlflow import MlflowClient

    runs = run.folder.parent
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    assert history(client, run, "loss") == [(10, 0.1)]
    assert (runs / "mlartifacts" / run_id(run) / "artifacts" / "recipe.yaml").is_file()
    assert client.get_run(run_id(run)).info.status == "RUNNING"  # not ended, as far as the file says


def test_which_server(make_run, monkeypatch):
    run = make_run()

    def chosen(live=True):
        return MlflowRun(run.folder, live=live).server

    assert chosen() == f"sqlite:///{run.folder.parent}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@tracker:5000/path")
    assert chosen() == "http://tracker:5000/path"
    assert "secret" not in (run.folder / "tracking.json").read_text()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert chosen(live=False) == "http://tracker:5000/path"  # a shell without the variable
    (run.folder / "recipe.yaml").write_text("tracking: {uri: 'http://other:1'}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert chosen() == "http://other:1"


def test_bad_folders(tmp_path, make_run):
    with pytest.raises(RunError, match=r"is no run folder: it holds no recipe.yaml"):
        sync(tmp_path)
    run = make_run()
    (run.folder / "tracking.json").write_text("{")
    with pytest.raises(RunError, match=r"tracking.json is damaged: remove it"):
        sync(run.folder)


def test_a_mirror_that_cannot_start(make_run, caplog):
    run = make_run()
    (run.folder / "logs").write_text("")
    assert not start_mirror(run.folder).finish(1)
    assert "no tracking, its process could not be started" in caplog.text
