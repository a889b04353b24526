"""Trackers that hang, refuse or have no space: the run has the time and the bits of one without trackers, and what is
sent later is complete. A run that is killed and resumed arrives once."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import ranked
import runs
import small_model
from bifrost.slurm.exit_codes import STOPPED
from bifrost.trainer.monitors import tensorboard_log
from tracked import accumulator, as_fp32, expected, scalars, wait_until

pytestmark = [pytest.mark.multi, pytest.mark.slow]
STEPS = 8


def arguments(shards: Path, folder: Path, *settings: str) -> list[str]:
    return runs.arguments(shards, folder, *settings, *small_model.settings(small_model.shared()))


@pytest.fixture(scope="module")
def untracked(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a run without trackers."""
    folder = tmp_path_factory.mktemp("untracked")
    (ended,) = ranked.bifrost(1, *arguments(shards, folder, f"steps={STEPS}"))
    assert ended.code == 0, ended.err
    return numbers(folder / "tiny-mllm")


def numbers(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in runs.steps(run)]


def damage(run: Path, tracker: str, how: str) -> Path:
    """Make the tracker's folder one that hangs, is full or is refused; return what has to be removed."""
    run.mkdir()
    if how == "refused":
        (run / tracker).write_text("")
        return run / tracker
    (run / tracker).mkdir()
    file = run / tracker / tensorboard_log.ASIDE
    if how == "hung":
        os.mkfifo(file)  # opening it waits forever
    else:
        file.symlink_to("/dev/full")
    return file


@pytest.mark.parametrize("how", ["hung", "full", "refused"])
def test_a_failing_tracker_costs_a_run_nothing(shards: Path, tmp_path: Path, untracked: list, how: str) -> None:
    run, folder = tmp_path / "tiny-mllm", tmp_path / "ranks"
    folder.mkdir()
    damaged = damage(run, "tensorboard", how)
    settings = ["steps=100000", "tracking.enabled=true", "tracking.to=[tensorboard]"]
    processes = ranked.start(ranked.command, 1, arguments(shards, tmp_path, *settings), folder=folder)
    runs.wait_for_steps(run, STEPS)
    log = run / "logs" / "tracking.log"
    wait_until((run / ".tensorboard.lock").exists if how == "hung" else lambda: "not sent" in log.read_text(), 60)
    seen = len(runs.steps(run))
    runs.wait_for_steps(run, seen + STEPS)
    os.kill(processes[0].pid, signal.SIGTERM)
    begun = time.monotonic()
    (ended,) = ranked.finish(processes, folder)
    assert ended.code == STOPPED, ended.err
    assert time.monotonic() - begun < 30
    assert numbers(run)[:STEPS] == untracked
    assert max(line["step_s"] for line in runs.steps(run)) < 10
    assert ended.out.count("not sent to TensorBoard, training continues") == (how != "hung")

    damaged.unlink(missing_ok=True)
    assert ranked.bifrost(1, "track", "sync", str(run))[0].code == 0
    assert scalars(accumulator(run).Reload()) == as_fp32(expected(run))


def train_and_die(arguments: list[str]) -> None:
    """Train until step 5, with a checkpoint of step 3, and be killed."""
    from bifrost.trainer.training import train as run

    real = run.train

    def after_step(progress: Any) -> None:
        if progress.step == 5:
            wait_until(lambda: list(Path(arguments[-1]).glob("step-*")))
            os.kill(os.getpid(), signal.SIGKILL)

    run.train = lambda recipe: real(recipe, after_step)  # type: ignore[assignment]
    ranked.command(arguments[:-1])


def test_a_killed_and_resumed_run_arrives_once(shards: Path, tmp_path: Path, untracked: list) -> None:
    run = tmp_path / "tiny-mllm"
    settings = [f"steps={STEPS}", "checkpoint.every=3", "tracking.enabled=true", "tracking.to=[tensorboard]"]
    train = arguments(shards, tmp_path, *settings)
    (ended,) = ranked.run(train_and_die, 1, [*train, str(run / "checkpoints")])
    assert ended.code == -signal.SIGKILL, ended.err
    (ended,) = ranked.bifrost(1, *train)
    assert ended.code == 0, ended.err
    assert numbers(run) == untracked
    assert [line["step"] for line in runs.events(run, "start")] == [0, 3]
    points = scalars(accumulator(run).Reload())
    assert points == as_fp32(expected(run))
    assert [step for step, _ in points["train/loss"]] == list(range(1, STEPS + 1))
