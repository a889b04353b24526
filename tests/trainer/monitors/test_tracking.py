import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bifrost.trainer.cli.track import app
from bifrost.trainer.errors import RunError
from bifrost.trainer.monitors import mlflow_run
from bifrost.trainer.monitors.evaluations import note_evaluation
from bifrost.trainer.monitors.mlflow_errors import explain
from bifrost.trainer.monitors.mlflow_run import MlflowRun
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
    (run.folder / "previews" / "step-20").mkdir(parents=True)
    (run.folder / "previews" / "step-20" / "a.png").write_bytes(b"image")
    mirror = start_mirror(run.folder)
    run.metrics.write({"event": "start", "step": 0, "ranks": 2})
    log_steps(run, (10, 20))
    run.metrics.write({"step": 30, "loss": math.nan, "time": 1700000000.5, "note": "text", "flag": True})
    run.metrics.write({"event": "evaluation", "step": 30, "fid": 7.5})
    run.metrics.write({"event": "end", "step": 30, "outcome": "finished"})
    assert mirror.finish(30)

    assert history(client, run, "train/samples") == [(10, 640), (20, 1280)]
    assert history(client, run, "evaluation/fid") == [(30, 7.5)]
    losses = history(client, run, "train/loss")
    assert losses[:2] == [(10, 0.1), (20, 0.05)]
    assert math.isnan(losses[2][1])
    assert min(p.timestamp for p in client.get_metric_history(run_id(run), "train/loss")) == 1700000000500
    found = client.get_run(run_id(run))
    assert set(found.data.metrics) == {"train/samples", "train/loss", "start/ranks", "evaluation/fid"}
    assert found.data.params["optimizer.betas"] == "[0.9, 0.95]"
    assert found.data.params["name"] == "demo"
    assert found.data.tags["bifrost.restarts"] == "0"
    assert (found.info.status, found.info.run_name) == ("FINISHED", "demo")
    assert found.info.start_time <= found.info.end_time
    assert {file.path for file in client.list_artifacts(run_id(run))} == {"recipe.yaml", "previews", "events.jsonl"}
    assert [file.path for file in client.list_artifacts(run_id(run), "previews/step-20")] == ["previews/step-20/a.png"]
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
    recipe.write_text(recipe.read_text() + "added: 1\n")
    run.metrics.write({"event": "start", "step": 10})
    mirror = start_mirror(run.folder)
    log_steps(run, (20, 30, 40), scale=2.0)
    wait_until(lambda: client.get_run(first).info.status == "RUNNING")
    run.metrics.write({"event": "end", "step": 40, "outcome": "finished"})
    assert mirror.finish(30)

    assert run_id(run) == first
    assert history(client, run, "train/loss") == [(10, 0.1), (20, 0.05), (30, pytest.approx(1 / 30)), (40, 0.05)]
    found = client.get_run(first)
    assert found.data.tags["bifrost.restarts"] == "1"
    assert (found.data.params["optimizer.lr"], found.data.params["added"]) == ("0.1", "1")
    assert found.info.status == "FINISHED"
    assert sync(run.folder) == 0


def test_a_rollback_leaves_no_dropped_point(server, client, make_run):
    """MLflow cannot delete points: another MLflow run takes over, with the whole course and nothing else."""
    run = make_run(server)
    run.metrics.write({"event": "start", "step": 0})
    log_steps(run, (10, 20, 30))
    target = MlflowRun(run.folder, live=True)
    target.push(last=False)
    first = run_id(run)
    run.metrics.rewind(20)
    run.metrics.write({"event": "rollback", "step": 30, "to": 20})
    target.push(last=False)
    second = run_id(run)
    assert second != first
    assert [step for step, _ in history(client, run, "train/loss")] == [10, 20]
    log_steps(run, (30, 40), scale=5.0)
    target.push(last=True)
    assert history(client, run, "train/loss") == [(10, 0.1), (20, 0.05), (30, pytest.approx(5 / 30)), (40, 0.125)]
    old, new = client.get_run(first), client.get_run(second)
    assert (old.info.status, old.info.run_name) == ("KILLED", "demo (dropped)")
    assert old.data.tags["bifrost.replaced_by"] == second and second in old.data.tags["mlflow.note.content"]
    assert (new.info.run_name, new.data.tags["bifrost.continues"]) == ("demo", first)
    assert new.info.start_time == old.info.start_time
    del target
    sync(run.folder)
    assert run_id(run) == second


def test_a_rollback_that_the_server_has_not_seen_costs_no_new_run(server, client, make_run):
    run = make_run(server)
    log_steps(run, (10, 20))
    target = MlflowRun(run.folder, live=True)
    target.push(last=False)
    first = run_id(run)
    run.metrics.write({"event": "rollback", "step": 29, "to": 20})
    log_steps(run, (30,))
    target.push(last=True)
    assert run_id(run) == first and [step for step, _ in history(client, run, "train/loss")] == [10, 20, 30]


@pytest.mark.parametrize(("saved", "same"), [(10, False), (30, True)])
def test_a_start_with_other_settings(server, client, make_run, saved, same):
    """The run continues in MLflow unless steps are repeated; then the first values would be those of other settings."""
    run = make_run(server)
    log_steps(run, (10, 20, 30))
    MlflowRun(run.folder, live=True).push(last=True)
    first = run_id(run)
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.1", "lr: 0.2"))
    run.metrics.rewind(saved)
    run.metrics.write({"event": "start", "step": saved})
    log_steps(run, range(saved + 10, 50, 10), scale=2.0)
    MlflowRun(run.folder, live=True).push(last=True)
    assert (run_id(run) == first) == same
    assert [step for step, _ in history(client, run, "train/loss")] == [10, 20, 30, 40]
    assert history(client, run, "train/loss")[2] == (30, pytest.approx((1 if same else 2) / 30))
    found = client.get_run(run_id(run)).data
    assert found.params["optimizer.lr"] == ("0.1" if same else "0.2")
    assert found.tags.get("bifrost.changed.optimizer.lr") == ("0.1 -> 0.2, step 30" if same else None)


def test_a_copied_run_gets_a_run_of_its_own_and_a_moved_one_keeps_it(server, client, make_run):
    run = make_run(server)
    log_steps(run, (10, 20))
    MlflowRun(run.folder, live=True).push(last=True)
    first, copy = run_id(run), run.folder.parent / "other"
    shutil.copytree(run.folder, copy)
    with open(copy / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 30, "loss": 9.0}\n')
    MlflowRun(copy, live=True).push(last=True)
    copied = json.loads((copy / "tracking.json").read_text())["run_id"]
    points = {each: [p.step for p in client.get_metric_history(each, "train/loss")] for each in (first, copied)}
    assert points == {first: [10, 20], copied: [10, 20, 30]}
    assert client.get_run(copied).info.run_name == "other"

    moved = copy.rename(run.folder.parent / "moved")
    MlflowRun(moved, live=True).push(last=True)
    assert json.loads((moved / "tracking.json").read_text())["run_id"] == copied
    assert client.get_run(copied).data.tags["bifrost.folder"] == str(moved)


def test_what_an_mlflow_user_looks_for(server, client, make_run, monkeypatch):
    monkeypatch.setenv("LOGNAME", "anna")
    run = make_run(server)
    recipe = run.folder / "recipe.yaml"
    shards = "https://host/{0..9}.tar?sig=secret"
    recipe.write_text(recipe.read_text() + f"stage: patch-latents\ndata: {{shards: '{shards}'}}\n")
    known = {"commit": "abc123", "ranks": 2, "dataset": {"shards": 10, "samples": 1815, "fingerprint": "f" * 64}}
    (run.folder / "environment.json").write_text(json.dumps(known))
    record = {"step": 10, "loss": 1.0, "loss_masked": 2.0, "lr": 0.1, "samples_per_s": 5.0, "rank_work_s_median": 1.0}
    run.metrics.write({**record, "mfu": 0.4, "ettr": 0.9, "peak_memory_gib": 3.0, "alloc_retries": 0})
    run.metrics.write({"event": "checkpoint", "step": 10, "seconds": 2.0})
    MlflowRun(run.folder, live=True).push(last=True)
    found = client.get_run(run_id(run))
    assert set(found.data.metrics) == {
        *("train/loss", "train/loss_masked", "train/lr"),
        *("perf/samples_per_s", "perf/rank_work_s_median", "perf/mfu", "perf/ettr"),
        *("memory/peak_memory_gib", "memory/alloc_retries", "checkpoint/seconds"),
    }
    tags = found.data.tags
    assert (tags["mlflow.source.name"], tags["mlflow.source.git.commit"]) == ("bifrost train demo", "abc123")
    assert (tags["mlflow.user"], tags["bifrost.stage"], tags["bifrost.ranks"]) == ("anna", "patch-latents", "2")
    (data,) = found.inputs.dataset_inputs
    assert data.dataset.name == "https://host/{0..9}.tar?sig=REDACTED" and data.dataset.digest == "f" * 16
    assert json.loads(data.dataset.profile) == {"num_rows": 1815, "num_shards": 10}
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "training")]
    experiment = client.get_experiment(found.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert "secret" not in str(found.to_dictionary())


def test_evaluations_arrive_in_any_order(server, client, make_run):
    run = make_run(server)
    log_steps(run, (10, 20))
    run.metrics.write({"event": "end", "step": 20, "outcome": "finished"})
    MlflowRun(run.folder, live=True).push(last=True)
    for step, value in ((20, 0.5), (10, 0.25), (20, 0.75)):
        time.sleep(0.002)  # points of one step differ in their milliseconds
        assert note_evaluation(run.folder, step, {"train": {"match": {"r1": value}, "name": "x"}}) is None
    assert history(client, run, "eval/train/match/r1") == [(10, 0.25), (20, 0.5), (20, 0.75)]
    assert client.get_run(run_id(run)).info.status == "FINISHED"
    assert sync(run.folder) == 0


def test_an_evaluation_that_cannot_be_sent_is_kept(door, make_run):
    run = make_run(door.uri)
    assert note_evaluation(run.folder, 10, {"r1": 1.0}) is None  # an export
    log_steps(run, (10,))
    (run.folder / "tracking.json").write_text(json.dumps({"key": "a", "starts": 1}))
    assert "`bifrost track sync" in note_evaluation(run.folder, 10, {"r1": 1.0, "latents": {"0.7": {"mse": 2.0}}})
    kept = json.loads((run.folder / "evaluations.jsonl").read_text())
    assert kept["r1"] == 1.0 and kept["latents/0.7/mse"] == 2.0


def test_what_was_deleted_in_mlflow(server, client, make_run):
    run = make_run(server)
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("experiment: bifrost", "experiment: gone"))
    log_steps(run, (10,))
    assert sync(run.folder) == 2
    first = client.get_run(run_id(run)).info
    client.delete_run(first.run_id)
    command = f"MLFLOW_TRACKING_URI={server} mlflow runs restore --run-id {first.run_id}"
    with pytest.raises(RunError, match=rf"run was deleted in MLflow: `{command}` restores it") as error:
        sync(run.folder)
    assert "try again" not in str(error.value)
    del error  # its frames hold the lock
    client.restore_run(first.run_id)
    client.delete_experiment(first.experiment_id)
    command = f"MLFLOW_TRACKING_URI={server} mlflow experiments restore -x {first.experiment_id}"
    for has_run in (True, False):
        if not has_run:
            (run.folder / "tracking.json").unlink()
        with pytest.raises(RunError, match=rf"experiment gone was deleted in MLflow: `{command}`"):
            sync(run.folder)
    client.restore_experiment(first.experiment_id)
    assert sync(run.folder) == 2


def test_a_store_that_was_removed_gets_the_run_again(make_run, server, client):
    run = make_run(server)
    log_steps(run, (10,))
    sync(run.folder)
    state = json.loads((run.folder / "tracking.json").read_text())
    (run.folder / "tracking.json").write_text(json.dumps({**state, "run_id": "0" * 32, "key": "f" * 32}))
    assert sync(run.folder) == 2
    assert history(client, run, "train/loss") == [(10, 0.1)]


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
        mirror = start_mirror(run.folder, said.append)
        wait_until(lambda: said)
        begin = time.monotonic()
        assert not mirror.finish(60)
        assert time.monotonic() - begin < 15
        http.shutdown()
    assert len(said) == 1 and "not sent to MLflow, training continues: http" in said[0] and "HTTP 401" in said[0]


def test_a_long_wait_at_the_end_is_announced(door, make_run, monkeypatch):
    door.hang()
    said = []
    mirror = start_mirror(make_run(door.uri).folder, said.append)
    wait_until(lambda: door.held)
    monkeypatch.setattr("bifrost.trainer.monitors.tracking.QUIET_S", 0.2)
    assert not mirror.finish(0.5)
    assert said == ["sending the end of the run to MLflow, 0.5 s at most"]


def test_a_machine_without_mlflow(make_run, monkeypatch):
    run, said = make_run(), []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not start_mirror(run.folder, said.append).finish(60)
    assert said == ["no tracking, mlflow is not installed: `pip install mlflow`, or set tracking.enabled=false"]
    line, permanent = explain(ModuleNotFoundError("No module named 'mlflow'", name="mlflow"), "")
    assert permanent and line.startswith("mlflow is not installed")


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
    assert history(client, run, "train/loss") == [(10, 0.1), (20, 0.05)]


def test_stop_signals_leave_the_mirror_at_work_and_it_is_polite(server, client, make_run):
    run = make_run(server)
    mirror = start_mirror(run.folder)
    wait_until(lambda: (run.folder / "tracking.json").exists() and run_id(run))
    assert os.getpriority(os.PRIO_PROCESS, mirror.process.pid) >= 10
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(mirror.process.pid, number)
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
    assert history(client, run, "train/loss") == [(10, 0.1), (20, 0.05), (30, pytest.approx(1 / 30))]
    assert client.get_run(run_id(run)).info.status == "FINISHED"


def test_a_mirror_finds_its_server_again_by_itself(server, client, door, make_run):
    run = make_run(door.uri)
    mirror = start_mirror(run.folder)
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
    assert sync(run.folder) == 0
    assert [file.path for file in client.list_artifacts(run_id(run))] == ["recipe.yaml"]


def test_the_default_store_is_next_to_the_run(make_run, whole_store):
    run = make_run()
    (run.folder.parent / "mlflow.db").write_bytes(whole_store)  # what the first run takes some seconds to make
    log_steps(run, (10,))
    assert sync(run.folder) == 2
    from mlflow import MlflowClient

    runs = run.folder.parent
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    assert history(client, run, "train/loss") == [(10, 0.1)]
    assert (runs / "mlartifacts" / run_id(run) / "artifacts" / "recipe.yaml").is_file()
    assert client.get_run(run_id(run)).info.status == "RUNNING"  # not ended, according to the file


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
    with pytest.raises(RunError, match=r"is not a run folder: it has no recipe.yaml"):
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
