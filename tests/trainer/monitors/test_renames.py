"""metrics.jsonl of earlier versions is read, and continued, under the names of this one."""

import json
import shutil
from pathlib import Path

import pytest

import first_version
from bifrost.trainer.monitors.goodput import summary
from bifrost.trainer.monitors.metrics import MetricsFile, read_metrics
from bifrost.trainer.monitors.renames import previews, rename_previews, with_new_names

EVENTS = [
    ({"event": "skipped", "reason": "r"}, {"event": "skipped_step", "reason": "r"}),
    ({"event": "replaced", "samples": []}, {"event": "bad_samples", "samples": []}),
    ({"event": "new_level", "rollbacks": 1}, {"event": "baseline_reset", "rollbacks": 1}),
    ({"event": "interval", "every": 3}, {"event": "checkpoint_interval", "every": 3}),
    (
        {"event": "hung", "rank": 1, "section": "data", "silent_s": 9.0, "bound_s": 8.0},
        {"event": "hang", "rank": 1, "phase": "data", "stalled_s": 9.0, "timeout_s": 8.0},
    ),
    (
        {"event": "straggler", "section": "data", "others_s": 1},
        {"event": "straggler", "phase": "data", "others_median_s": 1},
    ),
    ({"event": "save_failed", "in_a_row": 2}, {"event": "save_failed", "consecutive_failures": 2}),
    (
        {"event": "rollback", "to": 3, "passed_over": [4, 5], "gap_s": 0.0},
        {"event": "rollback", "to": 3, "skipped_batches": [4, 5], "downtime_s": 0.0},
    ),
    ({"event": "start", "gap_s": 2.0}, {"event": "start", "downtime_s": 2.0}),
    ({"event": "eval", "digest": 1.0}, {"event": "eval", "digest": 1.0}),  # a figure that somebody called so
]


@pytest.mark.parametrize(("old", "new"), EVENTS)
def test_events(old: dict, new: dict) -> None:
    assert with_new_names(old) == new and list(with_new_names(old)) == list(new)
    assert with_new_names(new) is new


@pytest.mark.parametrize(
    ("name", "has"),
    [
        ("tiny-mllm", {"allgather_gb_per_s", "rank_work_s_median", "rank_work_s_max"}),
        ("tiny-controlnet", {"loss_low_noise", "loss_high_noise", "rank_work_s_median", "rank_work_s_max"}),
    ],
)
def test_a_run_of_the_first_version(name: str, has: set[str], tmp_path: Path) -> None:
    shutil.copy(first_version.FOLDER / name / "metrics.jsonl", tmp_path)
    file = tmp_path / "metrics.jsonl"
    written = [json.loads(line) for line in file.read_text().splitlines()]
    read = read_metrics(file)
    lines = [record for record in read if "event" not in record]
    assert has | {"data_digest"} <= lines[0].keys() and not first_version.METRICS.values() & lines[0].keys()
    assert [list(record.values()) for record in read] == [list(record.values()) for record in written]
    before = summary(tmp_path)
    # A resume drops the last step and leaves a file that has today's names alone, without a difference in any value.
    last = lines[-1]["step"]
    assert MetricsFile(file).rewind(last - 1) == 1
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert kept == [record for record in read if "event" in record or record["step"] < last]
    content = file.read_bytes()
    assert MetricsFile(file).rewind(last - 1) == 0 and file.read_bytes() == content
    assert summary(tmp_path)["seconds"]["startup"] == before["seconds"]["startup"] > 0


def test_the_folder_of_previews(tmp_path: Path) -> None:
    rename_previews(tmp_path)
    assert previews(tmp_path) == tmp_path / "previews" and not list(tmp_path.iterdir())
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step-00000002.png").write_bytes(b"image")
    assert previews(tmp_path) == tmp_path / "samples", "a run that nobody continues stays as it is"
    for _ in range(2):
        rename_previews(tmp_path)
        assert (tmp_path / "previews" / "step-00000002.png").read_bytes() == b"image"
    assert [path.name for path in tmp_path.iterdir()] == ["previews"]
