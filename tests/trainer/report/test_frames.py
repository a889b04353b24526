"""A run's metrics as a frame: the steps without events, a column per key, also of a run that has not logged yet."""

import json
from pathlib import Path

import pytest

from bifrost import open_run
from bifrost.trainer.errors import RunError

LINES = [
    {"event": "start", "step": 0, "time": 1.0, "startup_s": 0.5},
    {"step": 10, "loss": 2.0, "lr": 0.1},
    {"event": "checkpoint", "step": 10, "time": 2.0, "seconds": 0.1},
    {"step": 20, "loss": 1.5, "lr": 0.2, "val_loss": 1.7},
]


def test_steps_and_events(tmp_path: Path) -> None:
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 30, "loss"')  # being written
    run = open_run(str(tmp_path))
    steps = run.steps()
    assert list(steps.index) == [10, 20] and steps.index.name == "step"
    assert list(steps.columns) == ["loss", "lr", "val_loss"]
    assert steps.loss.tolist() == [2.0, 1.5] and steps.val_loss.isna().tolist() == [True, False]
    assert [event["event"] for event in run.events()] == ["start", "checkpoint"]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(": 1.0}\n")
    assert list(run.steps().index) == [10, 20, 30], "read again"


def test_a_run_without_steps_and_a_folder_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: new\n")
    assert open_run(tmp_path).steps().empty and open_run(tmp_path).events() == []
    with pytest.raises(RunError, match="no such run folder"):
        open_run(tmp_path / "missing")
