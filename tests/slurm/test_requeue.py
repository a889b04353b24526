"""The batch script's own steps, with shell scripts in place of Slurm's commands."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import first_version
from bifrost.recipes import load_recipe
from bifrost.slurm.cli import slurm_app
from bifrost.slurm.exit_codes import HUNG, LOST, STOPPED
from bifrost.slurm.exit_record import attempts, record_outcome
from bifrost.slurm.job import Job
from bifrost.slurm.jobs import submit
from bifrost.slurm.requeue import after, before
from bifrost.slurm.script import render
from bifrost.slurm.site import Site
from clusterruns import Stand, failing

BUSY = failing("Socket timed out on send/recv operation")
RUNNING = "echo 'JobId=7 JobState=RUNNING Reason=None ExcNodeList={} EndTime=2026-01-01T00:00:00'"


def slurm(show: str = RUNNING.format("(null)"), requeue: str = "true", update: str = "true") -> str:
    """A stand-in for scontrol: shell commands per verb."""
    return f"case $* in *show*) {show};; *requeue*) {requeue};; *) {update};; esac"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    for name, value in {"BIFROST_RUN": str(run), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BIFROST_SITE", str(tmp_path / "site.yaml"))
    (tmp_path / "site.yaml").write_text("")
    # The steps ignore SIGTERM in their own process.
    monkeypatch.setattr("signal.signal", lambda *_: None)
    described = Job(
        name="run", run=str(run), folder=".", nodes=(2, 2), gpus_per_node=0, tasks_per_node=1, grace_s=120, id="7"
    )
    described.save()
    return described


def decision(job: Job) -> str:
    return attempts(job.path)[-1]["decision"]


def test_an_unknown_job_state_counts_as_running(job: Job, stand: Stand) -> None:
    stand("scontrol", slurm(show=BUSY))
    line, code = after(job.path, 137)
    assert decision(job) == "again" and ": requeued" in line and code == 137


def test_the_run_folder_records_that_slurm_never_answered(job: Job, stand: Stand) -> None:
    for program in ("scontrol", "sbatch", "squeue"):
        stand(program, BUSY)
    after(job.path, STOPPED)
    reason = json.loads((job.path / "stopped.json").read_text())["reason"]
    assert reason.startswith("stopped by a signal, saved; Slurm could not restart it: scontrol: Socket timed out")
    assert decision(job) == "stopped"


@pytest.mark.parametrize(
    ("text", "update", "expected"),
    [('{"node5": {"times": 1}}', BUSY, "but not without node5 (scontrol: Socket timed out"), ("{", "true", "requeued")],
)
def test_a_requeue_does_not_depend_on_the_excluded_nodes(
    job: Job, stand: Stand, text: str, update: str, expected: str
) -> None:
    calls = stand("scontrol", slurm(update=update))
    (job.path / "excluded.json").write_text(text)
    line, _ = after(job.path, 137)
    assert "requeue 7" in calls() and expected in line and decision(job) == "again"


@pytest.mark.parametrize(
    ("current", "asked", "book", "update"),
    [
        ("(null)", None, ["node5"], "node5"),
        ("node[5-6]", None, ["node5"], "node5"),
        ("node5", None, [], ""),
        ("node[1-2]", "node[1-2]", ["node5"], "node1,node2,node5"),
        ("node[1-2,5]", "node[1-2]", ["node5"], None),
        ("(null)", None, [], None),
    ],
)
def test_every_requeue_reads_the_excluded_nodes(
    job: Job, stand: Stand, current: str, asked: str | None, book: list[str], update: str | None
) -> None:
    """The user may have edited excluded.json, or another run may have found a bad node."""
    calls = stand("scontrol", slurm(RUNNING.format(current)))
    job.exclude = asked
    job.save()
    (job.path / "excluded.json").write_text(json.dumps({node: {"times": 1} for node in book}))
    after(job.path, 137)
    assert [call for call in calls() if "update" in call] == (
        [] if update is None else [f"update JobId=7 ExcNodeList={update}"]
    )


def test_the_suspect_node_of_two_hangs_is_excluded(job: Job, stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand("scontrol", slurm())
    for start, host in enumerate(["node2", "node1", "node2"]):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        (job.path / "slurm" / "exit_record.json").unlink(missing_ok=True)
        (job.path / "checkpoints" / f"step-{start:08}").mkdir(parents=True)
        record_outcome(HUNG, "no step for 100 s", host=host)
        after(job.path, HUNG)
        assert (job.path / "excluded.json").exists() == (start == 2)
    book = json.loads((job.path / "excluded.json").read_text())
    assert list(book) == ["node2"] and book["node2"]["reason"].startswith("hung in 2 attempts: ")
    assert "no step for 100 s" in book["node2"]["reason"]
    assert [call for call in calls() if "update" in call] == ["update JobId=7 ExcNodeList=node2"]
    assert [attempt["excluded"] for attempt in attempts(job.path)] == [[], [], ["node2"]]


def test_an_error_before_the_ranks_start_is_recorded_in_the_run_folder(job: Job) -> None:
    (job.path / "slurm" / "recipe.yaml").write_text("stage: none")
    with pytest.raises(ValueError, match="stage"):
        before(job.path)
    assert "stage" in json.loads((job.path / "stopped.json").read_text())["reason"]


@pytest.fixture
def script(job: Job, tmp_path: Path) -> Callable[[str], int]:
    """script(body) runs the job's batch script with `body` as the batch host's Python; returns the exit code."""

    def run(body: str) -> int:
        python = tmp_path / "host-python"
        python.write_text(f"#!/bin/bash\n{body}\n")
        python.chmod(0o755)
        text = render(job, Site(preflight=False)).replace(sys.executable, str(python))
        return subprocess.run(["bash", "-c", text], check=False, timeout=60).returncode

    return run


def test_a_host_that_cannot_run_our_steps(job: Job, stand: Stand, script: Callable[[str], int]) -> None:
    """Another host may be able to; the job stops at the third failure."""
    calls = stand("scontrol", "true")
    for _ in range(2):
        assert script("exit 127") == 127
    assert calls() == ["requeue 7"] * 2 and not (job.path / "stopped.json").exists()
    assert script("exit 127") == 127
    assert calls() == ["requeue 7"] * 2
    assert json.loads((job.path / "stopped.json").read_text())["code"] == 127


def test_a_refusal_to_start_is_final(stand: Stand, script: Callable[[str], int]) -> None:
    calls = stand("scontrol", "true")
    assert script("exit 2") == 2 and calls() == []


def test_a_last_step_ended_by_the_requeue_is_not_a_failure(
    job: Job, stand: Stand, script: Callable[[str], int]
) -> None:
    calls = stand("scontrol", "true")
    stand("srun", "true")
    assert script('[ "$3" = before ] && echo 2 || kill $$') == 143
    assert calls() == [] and not (job.path / "stopped.json").exists()


def test_a_host_on_which_the_last_step_cannot_run(stand: Stand, script: Callable[[str], int]) -> None:
    calls = stand("scontrol", "true")
    stand("srun", "exit 75")
    assert script('[ "$3" = before ] && echo 2 || exit 126') == 126
    assert calls() == ["requeue 7"]
    assert script('[ "$3" = before ] && echo 2 || echo 75') == 75, "the last step prints the job's exit code"


def test_site_settings_are_those_of_the_submission(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand: Stand
) -> None:
    """A container has no site file; preflight and the last step read the copy in the run folder."""
    from bifrost.slurm import preflight

    book = tmp_path / "bad_nodes.json"
    book.write_text('{"node3": {"times": 2}}')
    stand("sbatch", "echo 7")
    calls = stand("scontrol", failing("Invalid job id specified"), failing("Invalid job id specified"), "true")
    limits = {"free_gib": 0.5}
    settings = {"preflight_command": "check-it", "preflight_limits": limits, "bad_node_file": "~/bad_nodes.json"}
    monkeypatch.setenv("HOME", str(tmp_path))
    submit(job, load_recipe("tiny-mllm").to_yaml(), Site.model_validate(settings))
    monkeypatch.delenv("BIFROST_SITE")
    monkeypatch.setenv("HOME", str(tmp_path / "of-a-container"))
    seen = []
    monkeypatch.setattr(preflight, "preflight", lambda *arguments: seen.extend(arguments) or 0)
    monkeypatch.setattr("os._exit", lambda code: None)
    CliRunner().invoke(slurm_app, ["preflight", str(job.path)], catch_exceptions=False)
    assert seen[2].bad_node_file == str(book) and seen[3].free_gib == 0.5 and seen[5] == "check-it"
    after(job.path, 137)
    assert calls()[-1] == "update JobId=7 ExcNodeList=node3"


def test_a_job_that_an_earlier_version_submitted_is_continued(job: Job, stand: Stand) -> None:
    """Its script writes `slurm/unable`, its ranks may have left `slurm/outcome.json`, its recipe has the old names."""
    stand("scontrol", slurm())
    folder = job.path / "slurm"
    recipe = folder / "recipe.yaml"
    recipe.write_text((first_version.FOLDER / "tiny-mllm" / "recipe.yaml").read_text())
    for name in ("unable", "outcome.json"):
        (folder / name).write_text("{}")
    old = [{"time": 1.0 + i, "start": f"6.{i}", "step": 0, "nodes": 1} for i in range(2)]
    (folder / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    before(job.path)
    assert load_recipe(recipe).data.shuffle_window == 2, "the ranks read it next"
    assert not (folder / "unable").exists() and not (folder / "outcome.json").exists()
    assert [(attempt["attempt"], attempt["step"]) for attempt in attempts(job.path)] == [
        ("6.0", 0),
        ("6.1", 0),
        ("7.0", 0),
    ]
    written = {"start": "7.0", "rank": "3", "code": HUNG, "reason": "no step", "host": "node2"}
    (folder / "outcome.json").write_text(json.dumps(written))
    line, code = after(job.path, 143)
    assert code == HUNG and "3 attempts without a checkpoint" in line and line.endswith("rank 3: no step")


def test_a_storage_failure_in_a_step_is_retryable(job: Job) -> None:
    """The batch script requeues on any code but that of a user error."""
    program = f"""
import errno, os, runpy, sys
from bifrost.data import retry
def fail(path):
    raise OSError(errno.ESTALE, "Stale file handle", str(path))
retry.PATIENCE_S = 0.1
os.listdir = fail
sys.argv = ["bifrost.slurm", "after", {str(job.path)!r}, "--code", "137"]
runpy.run_module("bifrost.slurm", run_name="__main__")
"""
    found = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert found.returncode == LOST, found.stderr
    assert found.stderr.splitlines()[-1].startswith(f"error: {job.path / 'checkpoints'}: Stale file handle; ")
