"""MLflow that fails, refuses or is away: training does not wait, and nothing is lost or sent twice."""

import gc
import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from typer.testing import CliRunner

from bifrost.trainer.cli.track import app
from bifrost.trainer.errors import RunError
from bifrost.trainer.monitors import mlflow_run
from bifrost.trainer.monitors.evaluations import note_evaluation
from bifrost.trainer.monitors.mlflow_errors import explain
from bifrost.trainer.monitors.mlflow_run import MlflowRun
from bifrost.trainer.monitors.tracking import start_mirror, sync
from tracked import history, log_steps, log_text, run_id, train_until_killed, wait_until


class Answering(BaseHTTPRequestHandler):
    """A server that gives one answer to everything."""

    status = 401

    def do_GET(self):
        self.send_response(self.status)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("status", "said", "again"),
    [
        (401, r"refuses access \(HTTP 401\): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD", False),
        (403, r"refuses access \(HTTP 403\)", False),
        (404, r"is not an MLflow server \(HTTP 404\): set tracking.uri", False),
        (503, r"503", True),
        (429, r"429", True),
    ],
)
def test_permanent_errors_are_not_retried(make_run, status, said, again):
    handler = type("Handler", (Answering,), {"status": status})
    with HTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        run = make_run(f"http://127.0.0.1:{http.server_port}")
        with pytest.raises(RunError, match=said) as error:
            sync(run.folder)
        assert str(error.value).endswith("; try again") == again
        http.shutdown()


def test_the_end_of_a_run_does_not_wait_for_what_cannot_succeed(make_run):
    said = []
    with HTTPServer(("127.0.0.1", 0), Answering) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        run = make_run(f"http://127.0.0.1:{http.server_port}")
        mirror = start_mirror(run.folder, ["mlflow"], said.append)
        wait_until(lambda: said)
        begin = time.monotonic()
        assert not mirror.finish(60)
        assert time.monotonic() - begin < 15
        http.shutdown()
    shown = [line for line in said if not line.startswith("sending the end")]  # a slow machine also announces the wait
    assert len(shown) == 1 and "not sent to MLflow, training continues: http" in shown[0] and "HTTP 401" in shown[0]


def test_a_long_wait_at_the_end_is_announced(door, make_run, monkeypatch):
    door.hang()
    said = []
    mirror = start_mirror(make_run(door.uri).folder, ["mlflow"], said.append)
    wait_until(lambda: door.held)
    monkeypatch.setattr("bifrost.trainer.monitors.tracking.QUIET_S", 0.2)
    assert not mirror.finish(0.5)
    assert said == ["sending the end of the run to MLflow, 0.5 s at most"]


def test_a_machine_without_mlflow(make_run, monkeypatch):
    run, said = make_run(), []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not start_mirror(run.folder, ["mlflow"], said.append).finish(60)
    assert said == ["no tracking, mlflow is not installed: `pip install mlflow`, or set tracking.enabled=false"]
    line, permanent = explain(ModuleNotFoundError("No module named 'mlflow'", name="mlflow"), "")
    assert permanent and line.startswith("mlflow is not installed")


def test_a_killed_trainer_leaves_a_mirror_that_sends_the_rest(server, client, make_run):
    run = make_run(server)
    train_until_killed(run, "mlflow")
    wait_until(lambda: (run.folder / "tracking.json").exists() and run_id(run))
    wait_until(lambda: client.get_run(run_id(run)).info.status == "FAILED")
    assert history(client, run, "train/loss") == [(10, 0.1), (20, 0.05)]


def test_stop_signals_leave_the_mirror_at_work_and_it_is_polite(server, client, make_run):
    run = make_run(server)
    mirror = start_mirror(run.folder, ["mlflow"])
    wait_until(lambda: (run.folder / "tracking.json").exists() and run_id(run))
    assert os.getpriority(os.PRIO_PROCESS, mirror.processes["mlflow"].process.pid) >= 10
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(mirror.processes["mlflow"].process.pid, number)
    with pytest.raises(RunError, match="is being sent by another process"):
        sync(run.folder)
    log_steps(run, (10,))
    assert mirror.finish(30)
    assert history(client, run, "train/loss") == [(10, 0.1)]


@pytest.mark.parametrize("hanging", [True, False])
def test_a_server_that_is_away_costs_training_nothing(server, client, door, make_run, hanging):
    run = make_run(door.uri)
    if hanging:
        door.hang()
    begin = time.monotonic()
    mirror = start_mirror(run.folder, ["mlflow"])
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
    assert history(client, run, "train/loss") == [(10, 0.1), (20, 0.05), (30, pytest.approx(1 / 30))]
    assert client.get_run(run_id(run)).info.status == "FINISHED"


def test_a_mirror_finds_its_server_again_by_itself(server, client, door, make_run):
    run = make_run(door.uri)
    mirror = start_mirror(run.folder, ["mlflow"])
    log_steps(run, (10, 20))
    wait_until(lambda: "not sent" in log_text(run))
    door.open_to(server)
    log_steps(run, (30,))
    assert mirror.finish(30)  # does not sit out its wait
    assert [step for step, _ in history(client, run, "train/loss")] == [10, 20, 30]


def test_sync_reports_what_is_wrong(door, make_run):
    run = make_run(door.uri)
    log_steps(run, (10,))
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("http://", "http://user:secret@"))  # as older versions took it
    with pytest.raises(
        RunError, match=rf"demo could not be sent to MLflow: {door.uri} is not available: .*; try again"
    ) as error:
        sync(run.folder)
    assert "secret" not in str(error.value)
    assert error.value.transient  # code 74: the server may come back


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
    assert [step for step, _ in history(client, run, "train/loss")] == list(range(10, 90, 10))
    assert len(calls) == 2 + (not arrived)


def test_a_run_whose_creation_reply_was_lost_is_found(server, client, make_run):
    run = make_run(server)
    MlflowRun(run.folder, live=True).push(last=True)
    first = run_id(run)
    state = json.loads((run.folder / "tracking.json").read_text())
    (run.folder / "tracking.json").write_text(json.dumps({**state, "run_id": None}))
    sync(run.folder)
    assert run_id(run) == first


@pytest.mark.parametrize("status", [None, 404, 503])
def test_an_address_without_an_answer_does_not_redirect_a_run(server, client, make_run, monkeypatch, status):
    from mlflow.exceptions import MlflowException

    run = make_run()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    log_steps(run, (10,))
    sync(run.folder)
    before = json.loads((run.folder / "tracking.json").read_text())
    assert before["uri"] == server and before["run_id"]
    with HTTPServer(("127.0.0.1", 0), type("Handler", (Answering,), {"status": status})) as http:
        if status is None:
            http.server_close()
        else:
            threading.Thread(target=http.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{http.server_port}")
        assert "could not be sent to MLflow" in (note_evaluation(run.folder, 10, {"r1": 1.0}) or "")
        gc.collect()  # the traceback of the failed attempt holds its lock
        resumed = MlflowRun(run.folder, live=True)
        with pytest.raises(MlflowException):
            resumed.push(last=False)
        del resumed
        gc.collect()
        if status is not None:
            http.shutdown()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert json.loads((run.folder / "tracking.json").read_text()) == {**before, "starts": before["starts"] + 1}
    sync(run.folder)
    assert run_id(run) == before["run_id"]
    assert history(client, run, "eval/r1") == [(10, 1.0)]


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
    assert history(client, run, "train/loss") == [(10, 0.1)]
    assert sync(run.folder) == {"mlflow": 0}
    assert [file.path for file in client.list_artifacts(run_id(run))] == ["recipe.yaml"]


def test_bad_folders(tmp_path, make_run):
    with pytest.raises(RunError, match=r": not a run folder, it has no recipe\.yaml; "):
        sync(tmp_path)
    run = make_run()
    (run.folder / "tracking.json").write_text("{")
    with pytest.raises(RunError, match=r"tracking.json is damaged: remove it"):
        sync(run.folder)


def test_a_mirror_that_cannot_start(make_run, caplog):
    run = make_run()
    (run.folder / "logs").write_text("")
    assert not start_mirror(run.folder, ["mlflow"]).finish(1)
    assert "no tracking by MLflow, its process could not be started" in caplog.text


def test_an_evaluation_that_cannot_be_sent_is_kept(door, make_run):
    run = make_run(door.uri)
    assert note_evaluation(run.folder, 10, {"r1": 1.0}) is None  # an export
    log_steps(run, (10,))
    (run.folder / "tracking.json").write_text(json.dumps({"key": "a", "starts": 1}))
    assert "`bifrost track sync" in note_evaluation(run.folder, 10, {"r1": 1.0, "latents": {"0.7": {"mse": 2.0}}})
    kept = json.loads((run.folder / "evaluations.jsonl").read_text())
    assert kept["r1"] == 1.0 and kept["latents/0.7/mse"] == 2.0
