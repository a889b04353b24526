"""What of a run arrives in MLflow: points, runs, settings, files."""

import json
import math
import shutil
import time
from pathlib import Path

import pytest

from bifrost.trainer.errors import RunError
from bifrost.trainer.monitors.evaluations import note_evaluation
from bifrost.trainer.monitors.mlflow_run import MlflowRun
from bifrost.trainer.monitors.tracking import start_mirror, sync
from tracked import history, log_steps, run_id, wait_until


@pytest.mark.slow
def test_a_run_arrives_whole(server, client, make_run):
    run = make_run(server)
    (run.folder / "previews" / "step-20").mkdir(parents=True)
    (run.folder / "previews" / "step-20" / "a.png").write_bytes(b"image")
    mirror = start_mirror(run.folder, ["mlflow"])
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


@pytest.mark.slow
def test_a_resume_that_repeats_steps(server, client, make_run):
    run = make_run(server)
    mirror = start_mirror(run.folder, ["mlflow"])
    log_steps(run, (10, 20, 30))
    run.metrics.write({"event": "end", "step": 30, "outcome": "stopped"})
    assert mirror.finish(30)
    first = run_id(run)
    assert client.get_run(first).info.status == "KILLED"

    run.metrics.rewind(10)
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "added: 1\n")
    run.metrics.write({"event": "start", "step": 10})
    mirror = start_mirror(run.folder, ["mlflow"])
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
    assert sync(run.folder) == {"mlflow": 0}


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
    assert sync(run.folder) == {"mlflow": 0}


def test_what_was_deleted_in_mlflow(server, client, make_run):
    run = make_run(server)
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("experiment: bifrost", "experiment: gone"))
    log_steps(run, (10,))
    assert sync(run.folder) == {"mlflow": 2}
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
    assert sync(run.folder) == {"mlflow": 2}


def test_a_store_that_was_removed_gets_the_run_again(make_run, server, client):
    run = make_run(server)
    log_steps(run, (10,))
    sync(run.folder)
    state = json.loads((run.folder / "tracking.json").read_text())
    (run.folder / "tracking.json").write_text(json.dumps({**state, "run_id": "0" * 32, "key": "f" * 32}))
    assert sync(run.folder) == {"mlflow": 2}
    assert history(client, run, "train/loss") == [(10, 0.1)]


def test_the_default_store_is_next_to_the_run(make_run, whole_store):
    run = make_run()
    (run.folder.parent / "mlflow.db").write_bytes(whole_store)  # what the first run takes some seconds to make
    log_steps(run, (10,))
    assert sync(run.folder) == {"mlflow": 2}
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
