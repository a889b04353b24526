import json
import math
import os
import shutil
import time

import pytest

from bifrost.trainer.monitors.metrics import MetricsFile, Tail, read_metrics
from bifrost.trainer.monitors.series import series_name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def steps(path):
    return [record.get("step") for record in read_metrics(path)]


def test_lines_are_readable_at_once_and_dated(path):
    metrics = MetricsFile(path)
    before = time.time()
    metrics.write({"step": 10, "loss": 0.5})
    assert json.loads(path.read_text())["loss"] == 0.5
    metrics.write({"step": 20, "loss": math.nan, "time": 1.0})
    first, second = read_metrics(path)
    assert before <= first["time"] <= time.time()
    assert second["time"] == 1.0
    assert math.isnan(second["loss"])


def test_rewind_drops_later_steps_and_keeps_events(path):
    metrics = MetricsFile(path)
    for step in (10, 20, 30, 40):
        metrics.write({"step": step})
        metrics.write({"event": "evaluation", "step": step})
    assert metrics.rewind(20) == 2
    assert [(r["step"], "event" in r) for r in read_metrics(path)] == [
        (10, False), (10, True), (20, False), (20, True), (30, True), (40, True),
    ]  # fmt: skip
    assert metrics.rewind(20) == 0
    metrics.write({"step": 30})
    assert steps(path)[-1] == 30
    assert os.listdir(path.parent) == ["metrics.jsonl"]


def test_rewind_drops_a_torn_line_and_a_missing_file_is_fine(path):
    assert MetricsFile(path).rewind(5) == 0
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert MetricsFile(path).rewind(5) == 1
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_torn_line_costs_only_itself(path):
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert steps(path) == [1]
    MetricsFile(path).write({"step": 3})
    assert steps(path) == [1, 3]


def test_full_disk_is_logged_once_and_never_raised(path, caplog):
    metrics = MetricsFile("/dev/full")
    for step in range(3):
        metrics.write({"step": step})
    assert len(caplog.records) == 1
    assert "/dev/full cannot be written, metric lines are lost: No space left on device" in caplog.text


def test_writing_goes_on_when_the_disk_takes_lines_again(path, caplog):
    folder = path.parent / "gone"
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.write({"step": 1})
    folder.mkdir()
    metrics.write({"step": 2})
    assert steps(metrics.path) == [2]
    shutil.rmtree(folder)
    metrics.write({"step": 3})
    assert len(caplog.records) == 2  # a second failure is news again


def test_tail_follows_appends_and_a_rewind(path):
    tail = Tail(path)
    assert tail.read() == []
    metrics = MetricsFile(path)
    metrics.write({"step": 1})
    metrics.write({"step": 2})
    assert [r["step"] for r in tail.read()] == [1, 2]
    assert tail.read() == []
    with open(path, "a") as file:
        file.write('{"step": 3')
        file.flush()
        assert tail.read() == []
        file.write("}\n")
    assert [r["step"] for r in tail.read()] == [3]
    metrics.rewind(1)
    assert [r["step"] for r in tail.read()] == [1]


def test_writing_is_cheap(path):
    metrics = MetricsFile(path)
    begin = time.perf_counter()
    for step in range(200):
        metrics.write({"step": step, "loss": 0.1})
    assert (time.perf_counter() - begin) / 200 < 5e-3


def test_groups_of_metrics_in_mlflow() -> None:
    names = {"loss": "train/loss", "step_s": "perf/step_s", "alloc_retries": "memory/alloc_retries"}
    names |= {"val_loss": "validation/loss", "val_loss_mask_0.7": "validation/loss_mask_0.7"}
    assert {key: series_name(key, None) for key in names} == names
    assert series_name("seconds", "checkpoint") == "checkpoint/seconds"
