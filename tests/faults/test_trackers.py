"""Trackers that hang, refuse or have no space: the run has the time and the bits of one without trackers, and what is
sent later is complete. A run that is killed and resumed arrives once."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import ranked
import runs
import small_model
from bifrost.slurm.exit_codes import STOPPED
from bifrost.trainer.monitors import tensorboard_log
from bifrost.trainer.monitors.trackers import TITLES
from tracked import accumulator, as_fp32, expected, scalars, wait_until, wandb_points, wandb_records

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


@contextmanager
def damaged(run: Path, tracker: str, how: str) -> Iterator[dict[str, str]]:
    """Within it, the tracker's folder hangs, is full or is refused, or W&B's server hangs. Yields variables for the
    run."""
    folder, server = run / tracker, socket.socket()
    run.mkdir()
    if how == "refused":
        folder.write_text("")
        yield {}
        folder.unlink()
    elif tracker == "tensorboard":
        folder.mkdir()
        file = folder / tensorboard_log.ASIDE
        if how == "hung":
            os.mkfifo(file)  # opening it waits forever
        else:
            file.symlink_to("/dev/full")
        yield {}
        file.unlink(missing_ok=True)
    elif how == "hung":
        server.bind(("127.0.0.1", 0))
        server.listen(50)  # connections are accepted by the kernel, and never answered
        yield {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
    else:
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"mounts need root: {mounted.stderr.decode().strip()}")
        (folder / "filler").write_bytes(bytes(1 << 15))
        yield {}
        subprocess.run(["umount", "-l", folder], check=True)
    server.close()


@pytest.mark.parametrize("how", ["hung", "full", "refused"])
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_failing_tracker_costs_a_run_nothing(
    shards: Path, tmp_path: Path, untracked: list, monkeypatch: pytest.MonkeyPatch, tracker: str, how: str
) -> None:
    run = tmp_path / "tiny-mllm"
    with damaged(run, tracker, how) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        out = train_for_a_while(shards, tmp_path, tracker, "not sent" if how == "refused" else "")
    for name in variables:
        monkeypatch.delenv(name)
    assert numbers(run)[:STEPS] == untracked
    assert max(line["step_s"] for line in runs.steps(run)) < 10
    if how == "refused":
        assert out.count(f"not sent to {TITLES[tracker]}, training continues") == 1
    assert ranked.bifrost(1, "track", "sync", str(run))[0].code == 0
    assert_complete(run, tracker)


def assert_complete(run: Path, tracker: str) -> None:
    if tracker == "tensorboard":
        assert scalars(accumulator(run).Reload()) == as_fp32(expected(run))
    else:
        assert wandb_points(wandb_records(run)) == expected(run)


def train_for_a_while(shards: Path, tmp_path: Path, tracker: str, logged: str) -> str:
    """Train until the tracker's mirror has begun, and `logged` this, and for some steps more. Returns the output."""
    run, folder = tmp_path / "tiny-mllm", tmp_path / "ranks"
    folder.mkdir()
    settings = ["steps=100000", "tracking.enabled=true", f"tracking.to=[{tracker}]"]
    processes = ranked.start(ranked.command, 1, arguments(shards, tmp_path, *settings), folder=folder)
    runs.wait_for_steps(run, STEPS)
    wait_until((run / f".{tracker}.lock").exists, 60)
    wait_until(lambda: logged in (run / "logs" / "tracking.log").read_text(), 60)
    seen = len(runs.steps(run))
    runs.wait_for_steps(run, seen + STEPS)
    os.kill(processes[0].pid, signal.SIGTERM)
    begun = time.monotonic()
    (ended,) = ranked.finish(processes, folder)
    assert ended.code == STOPPED, ended.err
    assert time.monotonic() - begun < 30
    return ended.out


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
    settings = [f"steps={STEPS}", "checkpoint.every=3", "tracking.enabled=true", "tracking.to=[tensorboard,wandb]"]
    train = arguments(shards, tmp_path, *settings, f"tracking.prometheus={tmp_path}")
    (ended,) = ranked.run(train_and_die, 1, [*train, str(run / "checkpoints")])
    assert ended.code == -signal.SIGKILL, ended.err
    (ended,) = ranked.bifrost(1, *train)
    assert ended.code == 0, ended.err
    assert numbers(run) == untracked
    assert [line["step"] for line in runs.events(run, "start")] == [0, 3]
    for tracker in ("tensorboard", "wandb"):
        assert_complete(run, tracker)
    state = (tmp_path / "bifrost-tiny-mllm.prom").read_text()
    assert f'bifrost_run_step{{run="tiny-mllm",stage="patch-latents"}} {STEPS}.0' in state
    assert 'outcome="finished"' in state and "bifrost_train_loss" not in state
    assert [step for step, _ in expected(run)["train/loss"]] == list(range(1, STEPS + 1))
