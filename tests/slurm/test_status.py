"""Output of `bifrost slurm status`."""

import json
from pathlib import Path

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
