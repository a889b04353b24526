"""A run whose storage fails: the kernel itself refuses rank 1's bytes, by the limit that it sets on a file's size."""

import resource
import sys
import threading
import time
from pathlib import Path

import pytest

import ranked
import runs

pytestmark = pytest.mark.multi


def train(arguments: list[str], full_from: int, full_until: int) -> None:
    """One rank; between the two steps rank 1 cannot write more than 4 KiB into any file."""
    import torch.distributed as dist

    from bifrost.trainer.cli import main
    from bifrost.trainer.training import train as run

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def after_step(progress) -> None:
        if dist.get_rank() == 1 and progress.step in (full_from, full_until):
            limit = 1 << 12 if progress.step == full_from else hard
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    real = run.train
    run.train = lambda recipe: real(recipe, after_step)
    sys.argv = ["bifrost", *arguments]
    main.main()


def crash_after_a_save_that_shared_storage_refused(arguments: list[str]) -> None:
    """One rank, whose checkpoints' folder takes nothing from step 4 on; it is gone at step 5."""
    import os

    from bifrost.trainer.checkpoint import shard
    from bifrost.trainer.cli import main
    from bifrost.trainer.training import train as run

    real_train, real_write, failing = run.train, shard.write_file, []

    def write_file(path, parts):
        if failing and "tiny-mllm/checkpoints" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return real_write(path, parts)

    def after_step(progress) -> None:
        if progress.step in (3, 5):  # the save of the step before is in the background
            while any(thread.name == "save" for thread in threading.enumerate()):
                time.sleep(0.01)
        if progress.step == 3:
            failing.append(True)
        if progress.step == 5:
            os._exit(3)

    shard.write_file = write_file
    run.train = lambda recipe: real_train(recipe, after_step)
    sys.argv = ["bifrost", *arguments]
    main.main()


def train_with_late_copies(arguments: list[str]) -> None:
    """One rank, whose saves begin to copy the state only after the next passes."""
    from bifrost.trainer.checkpoint.staging import Staging
    from bifrost.trainer.cli import main

    real = Staging.take

    def take(*given):
        time.sleep(0.5)
        return real(*given)

    Staging.take = take
    sys.argv = ["bifrost", *arguments]
    main.main()


@pytest.fixture(scope="module")
def calm(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("calm")
    ended = ranked.bifrost(2, *runs.arguments(shards, folder, "steps=8"))
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    return runs.losses(folder / "tiny-mllm")


def test_the_update_waits_for_the_copy(shards: Path, tmp_path: Path, calm: list[float]) -> None:
    """A checkpoint holds the state of its step, whenever it is copied: that of a run which ended there."""
    arguments = runs.arguments(shards, tmp_path, "steps=8", "checkpoint.every=2", "checkpoint.keep=9", "ema.decay=0.9")
    ended = ranked.run(train_with_late_copies, 2, arguments)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    run = tmp_path / "tiny-mllm"
    assert runs.losses(run) == calm
    ended = ranked.bifrost(2, *runs.arguments(shards, tmp_path / "short", "steps=4", "ema.decay=0.9"))
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    for rank in ("rank-00000.safetensors", "rank-00001.safetensors"):
        found, wanted = (each / "checkpoints/step-00000004" / rank for each in (run, tmp_path / "short/tiny-mllm"))
        assert found.read_bytes() == wanted.read_bytes()
    saves = [event["blocked_s"] for event in runs.events(run, "checkpoint") if event["step"] < 8]
    assert len(saves) == 3 and all(0.2 < blocked < 2 for blocked in saves)


def test_training_goes_on_while_a_disk_is_full(shards: Path, tmp_path: Path, calm: list[float]) -> None:
    arguments = runs.arguments(shards, tmp_path, "steps=8", "checkpoint.every=2", "checkpoint.keep=9")
    ended = ranked.run(train, 2, arguments, 3, 5)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    run = tmp_path / "tiny-mllm"
    assert runs.losses(run) == calm
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in (2, 6, 8)]
    (failed,) = runs.events(run, "save_failed")
    assert (failed["step"], failed["consecutive_failures"]) == (4, 1)
    assert "rank 1 could not write the checkpoint" in failed["reason"] and "File too large" in failed["reason"]
    for event in runs.events(run, "checkpoint"):
        folder = run / f"checkpoints/step-{event['step']:08d}"
        assert event["bytes"] == sum(file.stat().st_size for file in folder.glob("[!m]*"))  # all but the manifest
        assert 0 < event["blocked_s"] <= event["seconds"]
    assert "not saved: " in ended[0].err


def test_own_disks_first_and_an_interval_by_cost(shards: Path, tmp_path: Path, calm: list[float]) -> None:
    """A crash while shared storage fails; the next attempt resumes from the nodes' disks."""
    near, run = tmp_path / "near", tmp_path / "tiny-mllm"
    settings = (f"checkpoint.local={near}", "checkpoint.interval=auto", "checkpoint.every=2")
    arguments = runs.arguments(shards, tmp_path, "steps=8", "checkpoint.mtbf_hours=1e-9", *settings)
    ended = ranked.run(crash_after_a_save_that_shared_storage_refused, 2, arguments)
    assert [rank.code for rank in ended] == [3, 3], ended[0].err
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000002"]
    assert len(list(near.glob("*/step-00000004.*"))) == 2

    ended = ranked.bifrost(2, *arguments)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert "checkpoint of step 4 recovered from the nodes' local disks" in ended[0].err
    assert [start["step"] for start in runs.events(run, "start")] == [0, 4]
    assert runs.losses(run) == calm
    assert list(near.glob("*/*")) == []
    saves = [event for event in runs.events(run, "checkpoint") if event["step"] > 4]
    assert all(0 < event["local_s"] <= event["seconds"] for event in saves)


def test_a_disk_that_stays_full_ends_the_run_with_the_reason(shards: Path, tmp_path: Path) -> None:
    settings = ("steps=9", "checkpoint.every=2", "checkpoint.max_failed_saves=2")
    ended = ranked.run(train, 2, runs.arguments(shards, tmp_path, *settings), 3, 100)
    assert [rank.code for rank in ended] == [1, 1], ended[0].err
    run = tmp_path / "tiny-mllm"
    line = ended[0].err.strip().splitlines()[-1]
    assert line.startswith("error: 2 saves in a row failed, the last at step 6: rank 1 could not write"), line
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert runs.steps(run)[-1]["step"] == 6
    assert runs.events(run, "end")[-1]["outcome"] == "failed"
