"""Output of `bifrost slurm status`."""

import json
from pathlib import Path

import pytest

from bifrost.slurm import jobs
from bifrost.slurm.job import Job


def test_numbers_are_short(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    sizes = {"gpus_per_node": 0, "tasks_per_node": 1, "grace_s": 60}
    Job(name="one", run=str(tmp_path), folder=str(tmp_path), nodes=(1, 1), **sizes).save()
    for loss, shown in ((0.12345678901234567, "loss 0.1235,"), (None, "loss not finite,")):
        line = {"step": 20, "loss": loss, "samples_per_s": 12.3456}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        assert shown in dict(jobs.status(tmp_path))["step"]


@pytest.mark.parametrize(("file", "key"), [("attempts.jsonl", "attempt"), ("starts.jsonl", "start")])
def test_attempts_are_called_so(tmp_path: Path, file: str, key: str) -> None:
    (tmp_path / "slurm").mkdir()
    sizes = {"gpus_per_node": 0, "tasks_per_node": 1, "grace_s": 60}
    Job(name="one", run=str(tmp_path), folder=str(tmp_path), nodes=(1, 1), **sizes).save()
    begun = {"time": 5.0, key: "7.1", "step": 3, "nodes": 2}
    lines = [begun, {"time": 9.0, key: "7.1", "decision": "done", "reason": "x"}]
    (tmp_path / "slurm" / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert dict(jobs.status(tmp_path))["attempt 7.1"].endswith("2 nodes from step 3; done: x")
