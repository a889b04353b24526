"""Jobs that score the checkpoints of a run: which one is next, when the chain ends; three scored on a cluster."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ranked
import run_folders
import runs
import tiny_flux
from bifrost.recipes import load_recipe
from bifrost.slurm import SlurmError
from bifrost.slurm.cli import slurm_app
from bifrost.slurm.eval_job import FILE, HELD, MAX_TRIES, RESULTS, next_checkpoint
from bifrost.slurm.job import Job
from clusterruns import ClusterRun, Stand, job, slurm

OPTIONS = ("--controlnet", "a controlnet", "--data", "/data/train-{0..9}.tar")
ALIVE = "case $* in *show*) echo 'JobId=7 JobState=RUNNING Reason=None';; esac"
ENDED = "case $* in *show*) echo 'JobId=7 JobState=COMPLETED Reason=None';; esac"


def submit_eval(*arguments: object) -> str:
    words = ["submit-eval", *map(str, arguments)]
    ended = CliRunner().invoke(slurm_app, words, catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.stdout.strip()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand: Stand) -> Path:
    """A run of 600 steps with a submitted job, whose checkpoints are saved by `saved`; SLURM_JOB_ID is the first job
    that scores it, 100."""
    monkeypatch.setenv("BIFROST_SITE", str(tmp_path / "site.yaml"))
    (tmp_path / "site.yaml").write_text("partition: gpu\n")
    run = tmp_path / "runs" / "a-run"
    (run / "slurm").mkdir(parents=True)
    (run / "recipe.yaml").write_text(load_recipe("tiny-mllm", ["steps=600"]).to_yaml())
    described = {"nodes": (1, 1), "gpus_per_node": 8, "tasks_per_node": 8, "grace_s": 60}
    Job(name="a-run", run=str(run), folder=".", id="7", **described).save()
    stand("sbatch", "true", "echo 100", "echo 101", "echo 102", "echo 103")
    stand("scontrol", ENDED)
    submit_eval(run, "--every", 200, "--minutes", 30, "--", *OPTIONS)
    stand("scontrol", ALIVE)
    monkeypatch.setenv("SLURM_JOB_ID", "100")
    return run


def saved(run: Path, *steps: int) -> None:
    for step in steps:
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text(str(step))


def scored(run: Path, step: int) -> None:
    (run / RESULTS / f"step-{step:08d}").mkdir(parents=True)
    (run / RESULTS / f"step-{step:08d}" / "metrics.json").write_text("{}")


def next_step(run: Path) -> int | None:
    found = next_checkpoint(run)
    return found and int(found.name.removeprefix("step-"))


def calls(program: str, run: Path) -> list[str]:
    return (run.parents[1] / f"{program}.calls").read_text().splitlines()


def test_every_checkpoint_is_scored_once(folder: Path, stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = stand("scancel", "true")
    saved(folder, 100, 200, 300, 400)
    assert next_step(folder) == 200
    scored(folder, 200)
    assert next_step(folder) == 400
    scored(folder, 400)
    assert next_step(folder) is None and not any((folder / HELD).iterdir())
    script = str(folder / "slurm/eval/job.sh")
    following = f"--parsable --dependency=afterany:100 --begin=now+30minutes {script}"
    assert calls("sbatch", folder)[1:] == [f"--parsable --hold {script}", following], "one, before the first is scored"
    assert cancelled() == []
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    with pytest.raises(SlurmError, match="job 99 is not the one that scores this run"):
        next_step(folder)
    monkeypatch.setenv("SLURM_JOB_ID", "101")
    saved(folder, 550, 600)
    assert next_step(folder) == 600
    monkeypatch.setenv("SLURM_JOB_ID", "100")
    with pytest.raises(SlurmError, match="job 100 is not the one"):
        next_step(folder)
    monkeypatch.setenv("SLURM_JOB_ID", "101")
    scored(folder, 600)
    assert next_step(folder) is None
    assert cancelled() == ["102"], "the run has its last step"


@pytest.mark.parametrize("reason", ["stopped", "ended"])
def test_the_chain_ends_with_the_run(folder: Path, stand: Stand, reason: str) -> None:
    cancelled = stand("scancel", "true")
    saved(folder, 200)
    if reason == "stopped":
        (folder / "stopped.json").write_text("{}")
    else:
        stand("scontrol", ENDED)
    assert next_step(folder) == 200
    assert cancelled() == []
    scored(folder, 200)
    assert next_step(folder) is None
    assert cancelled() == ["101"]


def test_a_checkpoint_is_held_while_it_is_scored(folder: Path) -> None:
    saved(folder, 200)
    held = next_checkpoint(folder)
    assert held is not None
    shutil.rmtree(folder / "checkpoints" / "step-00000200")
    assert (held / "manifest.json").read_text() == "200"


def test_a_checkpoint_that_is_pruned_before_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(folder, 200, 400)
    link = os.link

    def prune(source: Path, target: Path) -> None:
        shutil.rmtree(folder / "checkpoints" / "step-00000200", ignore_errors=True)
        link(source, target)

    monkeypatch.setattr(os, "link", prune)
    assert next_step(folder) == 400
    assert [path.name for path in (folder / HELD).iterdir()] == ["step-00000400"]


def test_a_file_system_without_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    saved(folder, 200)
    held = next_checkpoint(folder)
    assert held and (held / "manifest.json").read_text() == "200"


def test_a_checkpoint_that_cannot_be_scored_is_given_up(folder: Path) -> None:
    saved(folder, 200, 400)
    assert [next_step(folder) for _ in range(MAX_TRIES)] == [200] * MAX_TRIES
    assert next_step(folder) == 400
    assert json.loads((folder / FILE).read_text())["failures"] == {"200": MAX_TRIES}
    scored(folder, 400)
    shown = CliRunner().invoke(slurm_app, ["status", str(folder)], catch_exceptions=False).stdout
    line = (
        "job 100 RUNNING; job 101 RUNNING; 1 scored, newest step 400; step 200 failed 3 times, see slurm/eval/job.log"
    )
    assert line in " ".join(shown.split())


def test_a_run_of_stage_2_needs_no_stage_1(folder: Path) -> None:
    run = folder.with_name("stage-2")
    shutil.copytree(folder, run)
    (run / FILE).unlink()
    (run / "recipe.yaml").write_text(load_recipe("tiny-controlnet").to_yaml())
    submit_eval(run, "--", "--data", "/data/x.tar")
    script = (run / "slurm/eval/job.sh").read_text()
    assert "options=(--data /data/x.tar)" in script and "--mllm" not in script
    with pytest.raises(SlurmError, match=r"give the other options of `bifrost eval`: --data$"):
        submit_eval(run, "--", "--samples", 3)


def test_refused(folder: Path, tmp_path: Path) -> None:
    for options, message in {
        (folder, "--", *OPTIONS): r"a-run: job 100 scores this run; end it first: scancel 100",
        (folder, "--", *OPTIONS, "--mllm=x"): "--mllm: is set for every checkpoint; leave it out",
        (folder, "--", *OPTIONS, "--out", "x"): "--out: is set for every checkpoint",
        (folder, "--", "--data", "x"): "give the other options .*--data and --controlnet or --scenes",
        (folder, "--", "--scenes", "x"): "give the other options",
        (tmp_path / "none", "--", *OPTIONS): "none: no such run folder",
    }.items():
        with pytest.raises(SlurmError, match=message):
            submit_eval(*options)
    (folder / FILE).write_text("{}")
    with pytest.raises(SlurmError, match=r"job\.json: not written by bifrost slurm submit-eval; remove it"):
        submit_eval(folder, "--", *OPTIONS)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="apt-get install shellcheck")
def test_the_script_is_clean(folder: Path) -> None:
    script = (folder / "slurm/eval/job.sh").read_text()
    checked = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert len(script.splitlines()) < 60
    assert "--gpus-per-node=1" in script and "--partition=gpu" in script and "--signal" not in script
    assert "options=(--controlnet 'a controlnet' --data '/data/train-{0..9}.tar')" in script


@pytest.mark.multi
@pytest.mark.slow
def test_three_checkpoints_are_scored_on_a_cluster(run: ClusterRun, shards: Path, tmp_path: Path) -> None:
    """Two that are there, one of which is pruned meanwhile, and one that is saved after the first job has ended."""
    small = ("ema=null", "checkpoint.every=2", "steps=6")
    trained = ranked.bifrost(1, *runs.arguments(shards, tmp_path, *runs.TINY, *small))
    assert trained[0].code == 0, trained[0].err
    flux = tiny_flux.save(tiny_flux.pipeline(), tmp_path / "flux")
    controlnet = load_recipe("tiny-controlnet", [f"flux.path={flux}", "ema=null"])
    run_folders.save(tmp_path / "controlnet", controlnet, 2)
    checkpoints, later = run.run / "checkpoints", tmp_path / "later"
    (checkpoints / "step-00000006").rename(later)
    data = ("--controlnet", tmp_path / "controlnet", "--data", f"{shards}/train-*.tar")
    quick = ("--samples", 2, "--gallery", 4, "--steps", 1, "--flux-steps", 1)
    first = submit_eval(run.run, "--every", 2, "--minutes", 1, "--gpus", 0, "--", *data, *quick)
    try:
        run.wait("first checkpoint", lambda: (run.run / HELD / "step-00000002" / "manifest.json").exists())
        shutil.rmtree(checkpoints / "step-00000002")
        run.wait("two results", lambda: (run.run / RESULTS / "step-00000004" / "metrics.json").exists())
        run.wait("end of the first job", lambda: job(first)["JobState"] == "COMPLETED")
        later.rename(checkpoints / "step-00000006")
        run.wait("third result", lambda: (run.run / RESULTS / "step-00000006" / "metrics.json").exists())
        run.wait("end of the chain", lambda: not slurm("squeue", "--noheader", "--name=eval-tiny-mllm"))
    finally:
        slurm("scancel", "--name=eval-tiny-mllm")
        print((run.run / "slurm/eval/job.log").read_text())
    events = [json.loads(line) for line in (run.run / "evaluations.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [2, 4, 6]
    assert len({event["train/frechet/full"] for event in events}) == 3
    for step in (2, 4, 6):
        found = json.loads((run.run / RESULTS / f"step-{step:08d}" / "metrics.json").read_text())
        assert found["mllm"] == f"{run.run.resolve()} step {step}"
    second = json.loads((run.run / FILE).read_text())
    assert second["id"] != first and second["failures"] == {}
    assert not any((run.run / HELD).iterdir())
