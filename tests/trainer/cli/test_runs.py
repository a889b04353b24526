"""`bifrost runs`: the table of all runs, read only from their folders."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bifrost.slurm import SlurmError
from bifrost.trainer.cli import runs
from bifrost.trainer.cli.main import app
from bifrost.trainer.cli.runs import find_runs
from bifrost.trainer.errors import RunError

NOW = 1_000_000.0
START = {"event": "start", "step": 0, "ranks": 2, "time": NOW - 5000}


def end(outcome: str) -> dict:
    return {"event": "end", "step": 20, "outcome": outcome, "time": NOW - 4000}


def make(folder: Path, *records: dict, **files: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"name: {folder.name}\nstage: patch-latents\nsteps: 400\n")
    (folder / "environment.json").write_text(json.dumps({"ranks": 2, "host": "node1"}))
    if records:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, content in files.items():
        place = folder / name.replace("__", "/").replace("_json", ".json")
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(content))
    return folder


def step(number: int, loss: float | None = 0.123456789) -> dict:
    return {"step": number, "loss": loss, "time": NOW - 4500}


@pytest.mark.parametrize(
    ("records", "files", "state"),
    [
        ([START, step(20)], {"lock_json": {"beat": NOW - 5}}, "running"),
        ([START, step(20)], {"lock_json": {"beat": NOW - 500}}, "failed"),
        ([START, step(20)], {}, "failed"),
        ([START, step(20), end("finished")], {}, "finished"),
        ([START, step(20), end("stopped")], {}, "stopped"),
        ([START, step(20), end("failed")], {}, "failed"),
        ([START, step(20), {"event": "hang", "step": 20, "time": NOW}], {}, "failed"),
        ([START, end("stopped"), START], {"lock_json": {"beat": NOW}}, "running"),
        ([START, step(20), end("stopped")], {"slurm__job_json": {"id": "42"}}, "waiting in Slurm"),
        ([], {"slurm__job_json": {"id": "42"}}, "waiting in Slurm"),
        ([], {"slurm__job_json": {"id": "7"}}, "new"),
        ([], {"lock_json": {"beat": NOW}}, "running"),
        ([], {}, "new"),
    ],
)
def test_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list, files: dict, state: str) -> None:
    monkeypatch.setattr(runs, "waiting_jobs", lambda: {"42": "Resources"})
    make(tmp_path / "one", *records, **files)
    (run,) = find_runs(tmp_path, NOW)
    assert run.state == state
    if state == "waiting in Slurm":
        assert run.reason == "Resources"


def test_the_columns(tmp_path: Path) -> None:
    run = make(tmp_path / "one", START, step(10), step(20, 0.5), end("finished"))
    (run / "checkpoints" / "step-00000020").mkdir(parents=True)
    (run / "checkpoints" / "step-00000020" / "a").write_bytes(b"x" * 3000)
    (found,) = find_runs(tmp_path, NOW)
    assert (found.name, found.stage, found.step, found.steps) == ("one", "patch-latents", 20, 400)
    assert (found.loss, found.bytes, found.host, found.ranks) == (0.5, 3000, "node1", 2)
    assert found.active == NOW - 4000


def test_a_long_run_is_read_from_its_end(tmp_path: Path) -> None:
    lines = [START, *(step(number) for number in range(1, 12000)), end("stopped")]
    make(tmp_path / "one", *lines)
    assert (tmp_path / "one" / "metrics.jsonl").stat().st_size > 2 * runs.NEWEST
    (found,) = find_runs(tmp_path, NOW)
    assert (found.step, found.state) == (11999, "stopped")


def test_damage_hides_no_run(tmp_path: Path) -> None:
    run = make(tmp_path / "torn", START, step(20))
    (run / "recipe.yaml").write_text("{")
    (run / "environment.json").write_text("[")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 30, "lo')
    make(tmp_path / "whole", START, step(30), end("finished"))
    (tmp_path / "mlflow.db").touch()
    (tmp_path / "mlartifacts").mkdir()
    assert [(run.name, run.step) for run in find_runs(tmp_path, NOW)] == [("torn", 20), ("whole", 30)]


def test_without_slurm_nothing_is_asked_or_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> dict[str, str]:
        raise SlurmError("squeue not found")

    monkeypatch.setattr(runs, "waiting_jobs", absent)
    make(tmp_path / "one", START, step(20), end("stopped"), slurm__job_json={"id": "42"})
    assert find_runs(tmp_path, NOW)[0].state == "stopped"


def test_the_command(tmp_path: Path) -> None:
    make(tmp_path / "a-run", START, step(20), end("finished"))
    make(tmp_path / "bad", START, end("failed"), stopped_json={"reason": "3 starts without a step"})
    printed = CliRunner().invoke(app, ["runs", str(tmp_path)]).output
    assert "a-run" in printed and "20/400" in printed and "0.1235" in printed and "0.12345" not in printed
    assert "bad: 3 starts without a step" in printed
    listed = json.loads(CliRunner().invoke(app, ["runs", str(tmp_path), "--json"]).output)
    assert [run["name"] for run in listed] == ["a-run", "bad"]
    for missing in (tmp_path / "no", tmp_path / "a-run" / "empty"):
        if missing.name == "empty":
            missing.mkdir()
        with pytest.raises(RunError, match="contains the run folders, a recipe's runs_dir"):
            runs.runs(missing)
