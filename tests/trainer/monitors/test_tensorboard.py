"""What of a run arrives in TensorBoard's event files, read by TensorBoard's own reader."""

import os
import time

import pytest
from PIL import Image
from typer.testing import CliRunner

from bifrost.trainer.cli.track import app
from bifrost.trainer.errors import RunError
from bifrost.trainer.monitors import tensorboard_log
from bifrost.trainer.monitors.evaluations import note_evaluation
from bifrost.trainer.monitors.tensorboard_log import TensorboardLog
from bifrost.trainer.monitors.tracking import start_mirror, sync
from tracked import accumulator, as_fp32, expected, log_steps, log_text, scalars, train_until_killed, wait_until

NAME = ["tensorboard"]


def read(run):
    return accumulator(run.folder).Reload()


def files(run):
    """Names of the event files with content; at most one other is left."""
    found = sorted((run.folder / "tensorboard").iterdir())
    assert len(found) <= 2
    return [file.name for file in found if file.stat().st_size]


def test_a_run_arrives_whole(make_run):
    run, said = make_run(), []
    (run.folder / "previews").mkdir()
    for step, size in ((10, (8, 4)), (20, (6, 5))):
        Image.new("RGB", size, "red").save(run.folder / "previews" / f"step-{step:08d}.png")
    (run.folder / "recipe.yaml").write_text("name: demo\ndata: {shards: 'https://user:secret@host/a.tar'}\n")
    mirror = start_mirror(run.folder, NAME, said.append)
    run.metrics.write({"event": "start", "step": 0, "ranks": 2})
    log_steps(run, (10, 20))
    run.metrics.write({"step": 30, "loss": 1e300, "val_loss": 3.0, "time": 1700000000.5, "note": "text", "flag": True})
    run.metrics.write({"event": "end", "step": 30, "outcome": "finished"})
    assert mirror.finish(30)

    events = read(run)
    assert scalars(events) == {
        "start/ranks": [(0, 2.0)],
        "train/samples": [(10, 640.0), (20, 1280.0)],
        "train/loss": [(10, pytest.approx(0.1)), (20, pytest.approx(0.05)), (30, float("inf"))],
        "validation/loss": [(30, 3.0)],
    }
    assert events.Scalars("train/loss")[-1].wall_time == 1700000000.5
    images = [(each.step, each.width, each.height) for each in events.Images("previews")]
    assert images == [(10, 8, 4), (20, 6, 5)]
    first = (run.folder / "previews" / "step-00000010.png").read_bytes()
    assert events.Images("previews")[0].encoded_image_string == first
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in ("recipe", "status")}
    assert texts["status"] == "finished"
    assert "name: demo" in texts["recipe"] and "secret" not in texts["recipe"]
    assert f"TensorBoard: `tensorboard --logdir {run.folder.parent}`" in said


def test_a_resume_that_repeats_steps(make_run):
    """Read afresh, and by a TensorBoard that has been following the run."""
    run = make_run()
    log_steps(run, (10, 20, 30))
    TensorboardLog(run.folder, live=True).push(last=False)  # killed: neither its end nor its file's was written
    follower = read(run)
    assert [step for step, _ in scalars(follower)["train/loss"]] == [10, 20, 30]
    run.metrics.rewind(10)
    run.metrics.write({"event": "start", "step": 10, "startup_s": 2.0})
    log_steps(run, (20,), scale=2.0)
    target = TensorboardLog(run.folder, live=True)
    target.push(last=False)
    log_steps(run, (30, 40), scale=2.0)
    target.push(last=True)
    assert scalars(read(run)) == scalars(follower.Reload()) == as_fp32(expected(run.folder))
    assert len(files(run)) == 1


def test_a_rollback_leaves_no_dropped_point(make_run):
    run = make_run()
    log_steps(run, (10, 20, 30))
    target = TensorboardLog(run.folder, live=True)
    target.push(last=False)
    follower = read(run)
    run.metrics.rewind(20)
    run.metrics.write({"event": "rollback", "step": 30, "to": 20})
    log_steps(run, (30, 40), scale=5.0)
    target.push(last=False)
    assert scalars(read(run)) == scalars(follower.Reload()) == as_fp32(expected(run.folder))
    assert scalars(read(run))["train/loss"][2:] == [(30, pytest.approx(5 / 30)), (40, 0.125)]


def test_a_rollback_to_before_the_first_line(make_run):
    run = make_run()
    log_steps(run, (10,))
    target = TensorboardLog(run.folder, live=True)
    target.push(last=False)
    run.metrics.rewind(0)
    run.metrics.write({"event": "rollback", "step": 10, "to": 0})
    target.push(last=False)
    assert scalars(read(run)) == {"rollback/to": [(10, 0.0)]}


def test_evaluations_in_any_order(make_run):
    run = make_run()
    run.metrics.write({"event": "start", "step": 0})
    log_steps(run, (10, 20))
    run.metrics.write({"event": "end", "step": 20, "outcome": "stopped"})
    assert note_evaluation(run.folder, 10, {"r1": 0.5}) is None
    assert not (run.folder / "tensorboard").exists()  # a run that was not mirrored is not begun by an evaluation
    assert sync(run.folder, NAME) == {"tensorboard": 5}
    for step, value in ((20, 0.5), (10, 0.25)):
        assert note_evaluation(run.folder, step, {"train": {"r1": value}}) is None
    events = read(run)
    assert scalars(events)["eval/train/r1"] == [(10, 0.25), (20, 0.5)]
    assert scalars(events) == as_fp32(expected(run.folder))

    target = TensorboardLog(run.folder, live=True)
    target.push(last=False)
    with pytest.raises(RunError, match="is being sent by another process"):
        sync(run.folder, NAME)
    assert note_evaluation(run.folder, 5, {"train": {"r1": 0.125}}) is None  # left to the mirror
    target.push(last=False)
    assert scalars(read(run))["eval/train/r1"] == [(5, 0.125), (10, 0.25), (20, 0.5)]


def test_the_history_of_a_run_is_sent_later(make_run):
    run = make_run()
    log_steps(run, (10, 20))
    for _ in range(2):
        result = CliRunner().invoke(app, ["sync", str(run.folder), "--to", "tensorboard"])
        assert result.output == f"{run.folder}: 4 points sent, TensorBoard is up to date\n"
    assert scalars(read(run)) == as_fp32(expected(run.folder))
    assert not (run.folder / "tracking.json").exists()


def test_a_killed_trainer_leaves_a_mirror_that_writes_the_rest(make_run):
    run = make_run()
    train_until_killed(run, "tensorboard")
    wait_until(lambda: (run.folder / "tensorboard").exists() and "status" in read(run).Tags()["tensors"])
    assert read(run).Tensors("status")[0].tensor_proto.string_val == [b"failed"]
    assert scalars(read(run)) == as_fp32(expected(run.folder))


def test_a_mirror_killed_at_any_byte_leaves_the_history_or_its_beginning(make_run, monkeypatch):
    run = make_run()
    log_steps(run, (10, 20))
    TensorboardLog(run.folder, live=True).push(last=False)
    (name,) = files(run)
    whole = (run.folder / "tensorboard" / name).read_bytes()
    log_steps(run, (30,))
    monkeypatch.setattr("os.rename", killed)
    with pytest.raises(KeyboardInterrupt):  # after the new file was written under its other name
        TensorboardLog(run.folder, live=True).push(last=False)
    assert [step for step, _ in scalars(read(run))["train/loss"]] == [10, 20]
    monkeypatch.undo()
    for size in (0, 11, len(whole) - 1):
        (run.folder / "tensorboard" / files(run)[-1]).write_bytes(whole[:size])
        TensorboardLog(run.folder, live=True).push(last=False)
        assert scalars(read(run)) == as_fp32(expected(run.folder))
    assert len(files(run)) == 1


def killed(*_):
    raise KeyboardInterrupt


def test_a_full_disk_costs_no_point(make_run):
    run = make_run()
    log_steps(run, (10, 20))
    (run.folder / "tensorboard").mkdir()
    (run.folder / "tensorboard" / tensorboard_log.ASIDE).symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"could not be sent to TensorBoard: .*: OSError: No space left on device"):
        sync(run.folder, NAME)
    assert files(run) == []
    assert sync(run.folder, NAME) == {"tensorboard": 4}


def test_a_folder_that_is_refused_is_reported_once(make_run):
    run, said = make_run(), []
    (run.folder / "tensorboard").write_text("")
    mirror = start_mirror(run.folder, NAME, said.append)
    wait_until(lambda: said)
    log_steps(run, (10,))
    begin = time.monotonic()
    assert not mirror.finish(10)
    assert time.monotonic() - begin < 15
    assert len(said) == 1 and said[0].startswith("not sent to TensorBoard, training continues: ")
    assert log_text(run).count("not sent") == 1
    (run.folder / "tensorboard").unlink()
    assert sync(run.folder, NAME) == {"tensorboard": 2}


def test_a_folder_that_hangs_does_not_hold_up_the_end_of_a_run(make_run):
    run = make_run()
    (run.folder / "tensorboard").mkdir()
    blocking = run.folder / "tensorboard" / tensorboard_log.ASIDE
    os.mkfifo(blocking)  # opening it waits forever
    mirror = start_mirror(run.folder, NAME)
    log_steps(run, (10,))
    wait_until(lambda: (run.folder / ".tensorboard.lock").exists())
    begin = time.monotonic()
    assert not mirror.finish(1)
    assert time.monotonic() - begin < 5
    blocking.unlink()
    assert sync(run.folder, NAME) == {"tensorboard": 2}


def test_a_preview_that_is_no_image_does_not_hold_up_points(make_run):
    run = make_run()
    log_steps(run, (10,))
    (run.folder / "previews").mkdir()
    (run.folder / "previews" / "step-00000010.png").write_bytes(b"torn")
    with pytest.raises(RunError, match=r"tensorboard has every point of .* but not its files: UnidentifiedImageError"):
        sync(run.folder, NAME)
    assert scalars(read(run)) == as_fp32(expected(run.folder))


def test_a_missing_package_is_reported(make_run, monkeypatch):
    run = make_run()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = "tracking.to=tensorboard: tensorboard is not installed: pip install tensorboard, or unset it"
    with pytest.raises(RunError, match=said):
        sync(run.folder, NAME)


def test_one_tracker_that_fails_does_not_hold_up_another(make_run, door):
    """MLflow's server does not answer; the recipe names both."""
    run = make_run(door.uri)
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("{uri:", "{to: [mlflow, tensorboard], uri:"))
    log_steps(run, (10,))
    with pytest.raises(RunError, match=r"could not be sent to MLflow: .*; try again") as error:
        sync(run.folder)
    assert error.value.transient
    assert scalars(read(run)) == as_fp32(expected(run.folder))
