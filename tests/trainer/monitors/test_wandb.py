"""What of a run arrives in W&B's offline folder, read by W&B's own reader."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from PIL import Image

from bifrost.trainer.errors import RunError
from bifrost.trainer.monitors import wandb_run
from bifrost.trainer.monitors.evaluations import note_evaluation
from bifrost.trainer.monitors.tracking import start_mirror, sync
from bifrost.trainer.monitors.wandb_run import WandbRun
from runs import children
from tracked import expected, log_steps, wait_until, wandb_points, wandb_records

NAME = ["wandb"]


@pytest.fixture(autouse=True)
def _no_login_of_the_user(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def content(run):
    return wandb_points(wandb_records(run.folder))


def of_type(records, kind):
    return [record[kind] for record in records if record["type"] == kind]


@pytest.mark.slow
def test_a_run_arrives_whole(make_run):
    run, said = make_run(), []
    (run.folder / "previews").mkdir()
    Image.new("RGB", (8, 4), "red").save(run.folder / "previews" / "step-00000010.png")
    (run.folder / "recipe.yaml").write_text("name: demo\ndata: {shards: 'https://user:secret@host/a.tar'}\n")
    (run.folder / "environment.json").write_text(json.dumps({"commit": "abc123", "ranks": 2}))
    mirror = start_mirror(run.folder, NAME, said.append)
    run.metrics.write({"event": "start", "step": 0, "ranks": 2})
    log_steps(run, (10, 20))
    run.metrics.write({"step": 30, "loss": 1e300, "val_loss": 3.0, "time": 1700000000.5, "note": "text", "flag": True})
    run.metrics.write({"event": "end", "step": 30, "outcome": "finished"})
    assert mirror.finish(60)

    records = wandb_records(run.folder)
    assert wandb_points(records) == {
        "start/ranks": [(0, 2.0)],
        "train/samples": [(10, 640.0), (20, 1280.0)],
        "train/loss": [(10, 0.1), (20, 0.05), (30, 1e300)],
        "validation/loss": [(30, 3.0)],
    }
    rows = [row["item"] for row in of_type(records, "history")]
    assert next(row["_timestamp"] for row in rows if row.get("train/loss") == 1e300) == 1700000000.5
    (image,) = (row for row in rows if any(key.startswith("previews") for key in row))
    assert image["step"] == 10
    (media,) = (run.folder / "wandb").glob("offline-run-*/files/media/images/*.png")
    assert media.read_bytes() == (run.folder / "previews" / "step-00000010.png").read_bytes()
    (start,) = of_type(records, "run")
    assert start["run_id"] == json.loads((run.folder / "wandb.json").read_text())["key"]
    assert (start["project"], start["display_name"]) == ("bifrost", "demo")
    settings = json.dumps(start["config"])
    assert "abc123" in settings and "REDACTED" in settings and "secret" not in settings
    assert of_type(records, "metric")[0]["step_metric"] == "step"
    assert [exit.get("exit_code", 0) for exit in of_type(records, "exit")] == [0]
    assert any(line.startswith(f"W&B: `wandb sync {run.folder}/wandb/offline-run-") for line in said)


def test_resumes_and_rollbacks_leave_one_run_without_dropped_points(make_run):
    run = make_run()
    log_steps(run, (10, 20, 30))
    first = WandbRun(run.folder, live=True)
    first.push(last=False)
    first.end("stopped")
    before = wandb_records(run.folder)
    assert of_type(before, "preempting") and of_type(before, "exit")[0]["exit_code"] == 1
    first.close()

    run.metrics.rewind(10)
    run.metrics.write({"event": "start", "step": 10, "startup_s": 2.0})
    log_steps(run, (20,), scale=2.0)
    target = WandbRun(run.folder, live=True)
    target.push(last=False)
    log_steps(run, (30, 40), scale=2.0)
    target.push(last=False)
    run.metrics.rewind(20)
    run.metrics.write({"event": "rollback", "step": 40, "to": 20})
    target.push(last=False)
    log_steps(run, (30,), scale=5.0)
    target.push(last=False)
    target.end("failed")
    records = wandb_records(run.folder)
    assert wandb_points(records) == expected(run.folder)
    assert [step for step, _ in wandb_points(records)["train/loss"]] == [10, 20, 30]
    assert of_type(records, "run")[0]["run_id"] == of_type(before, "run")[0]["run_id"]
    assert of_type(records, "exit")[0]["exit_code"] == 1


def test_history_evaluations_and_copies(make_run):
    run = make_run()
    log_steps(run, (10, 20))
    run.metrics.write({"event": "end", "step": 20, "outcome": "finished"})
    assert sync(run.folder, NAME) == {"wandb": 4}
    assert note_evaluation(run.folder, 10, {"train": {"r1": 0.5}}) is None
    assert content(run) == expected(run.folder)
    assert content(run)["eval/train/r1"] == [(10, 0.5)]
    key = json.loads((run.folder / "wandb.json").read_text())["key"]
    copy = shutil.copytree(run.folder, run.folder.parent / "copy")
    for folder, same in ((copy, False), (copy.rename(run.folder.parent / "moved"), False), (run.folder, True)):
        if folder.exists():
            target = WandbRun(folder, live=False)
            assert (json.loads((folder / "wandb.json").read_text())["key"] == key) == same
            target.close()
    (run.folder / "wandb.json").write_text("{")
    with pytest.raises(RunError, match=r"wandb.json is damaged: remove it"):
        sync(run.folder, NAME)


def test_a_full_disk_is_reported_though_wandb_does_not(make_run):
    run = make_run()
    (run.folder / "wandb").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", run.folder / "wandb"]
    if (mounted := subprocess.run(command, capture_output=True)).returncode:
        pytest.skip(f"mounts need root: {mounted.stderr.decode().strip()}")
    log_steps(run, range(1, 2000))
    try:
        with pytest.raises(RunError, match=r"could not be sent to W&B: .* has \d+ of 1999 rows: free disk space; try"):
            sync(run.folder, NAME)
    finally:
        subprocess.run(["umount", "-l", run.folder / "wandb"], check=True)
    assert sync(run.folder, NAME) == {"wandb": 2 * 1999}
    assert content(run) == expected(run.folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_of_wandb_that_is_killed_costs_no_point(make_run, number):
    """Slurm signals every process of a job, and wandb's own ends on it."""
    run, said = make_run(), []
    mirror = start_mirror(run.folder, NAME, said.append)
    log_steps(run, (10,))
    wait_until(lambda: said, 60)
    (core,) = children(mirror.processes["wandb"].process.pid)
    os.kill(core, number)
    log_steps(run, (20,))
    run.metrics.write({"event": "end", "step": 20, "outcome": "finished"})
    assert mirror.finish(60)
    assert content(run) == expected(run.folder)
    assert of_type(wandb_records(run.folder), "exit")[0].get("exit_code", 0) == 0


def test_a_server_that_does_not_answer_is_reported_and_given_up(make_run, monkeypatch, door):
    """With a login, W&B is used online."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", door.uri)
    monkeypatch.setattr(wandb_run, "INIT_S", 3.0)
    run = make_run()
    log_steps(run, (10,))
    begin = time.monotonic()
    with pytest.raises(RunError, match=r"demo could not be sent to W&B: "):
        sync(run.folder, NAME)
    assert time.monotonic() - begin < 60
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert sync(run.folder, NAME) == {"wandb": 2}
    assert content(run) == expected(run.folder)


@pytest.mark.parametrize("host", ["api.wandb.ai", "other"])
def test_a_login_in_netrc_is_found(monkeypatch, tmp_path, host):
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
    os.chmod(tmp_path / "netrc", 0o600)
    assert wandb_run._has_login() == (host == "api.wandb.ai")


def test_a_killed_mirror_leaves_no_process(make_run):
    run, said = make_run(), []
    mirror = start_mirror(run.folder, NAME, said.append)
    wait_until(lambda: said, 60)
    (core,) = children(mirror.processes["wandb"].process.pid)
    mirror.processes["wandb"].kill()
    wait_until(lambda: subprocess.run(["ps", "-o", "stat=", str(core)], capture_output=True).stdout[:1] in (b"", b"Z"))
    assert sync(run.folder, NAME) == {"wandb": 0}
