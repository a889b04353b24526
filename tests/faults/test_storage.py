"""Run folders that cannot be written: refused with the cause at the start, tolerated during the run.

Saves that the storage refuses are also in trainer/training/test_saving.py; these tests cover all other files of a run.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import ranked
import runs
import small_model

pytestmark = pytest.mark.multi


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounts need root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def settings(tmp_path: Path) -> list[str]:
    return ["steps=8", "checkpoint.every=2", "ema.decay=0.9", *small_model.settings(tmp_path / "backbone")]


def fill(disk: Path) -> None:
    filler = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(filler, bytes(1 << 12))
    except OSError:
        os.close(filler)


def refused(arguments: list[str]) -> str:
    """The single error line; both ranks exit with code 2."""
    ended = ranked.bifrost(2, *arguments)
    assert [rank.code for rank in ended] == [2, 2], ended[0].err
    (line,) = ended[0].err.splitlines()
    assert line.startswith("error: ") and not ended[1].err
    return line


def test_full_disk_at_the_start(shards: Path, tmp_path: Path, disk: Path) -> None:
    fill(disk)
    line = refused(runs.arguments(shards, disk, *settings(tmp_path)))
    assert f"{disk}/tiny-mllm" in line and "No space left on device; free disk space" in line


def test_read_only_disk_at_the_start(shards: Path, tmp_path: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    line = refused(runs.arguments(shards, disk, *settings(tmp_path)))
    assert f"{disk}/tiny-mllm: Read-only file system; name a folder that can be written" in line


def train_while_full(arguments: list[str], disk: str) -> None:
    """Train while the disk is full from step 3 to step 5."""
    from bifrost.trainer.cli import main
    from bifrost.trainer.training import train as run

    def after_step(progress) -> None:
        if os.environ["RANK"] == "0" and progress.step == 3:
            with open(f"{disk}/tiny-mllm/metrics.jsonl", "ab") as metrics:  # the rest of its last block would have room
                metrics.write(b'{"event": "pad"}'.ljust((-metrics.tell() - 18) % 4096 + 17) + b"\n")
            fill(Path(disk))
        if os.environ["RANK"] == "0" and progress.step == 5:
            for thread in threading.enumerate():
                if thread.name == "save":  # the save of step 4
                    thread.join()
            (Path(disk) / "filler").unlink()

    real = run.train
    run.train = lambda recipe: real(recipe, after_step)
    sys.argv = ["bifrost", *arguments]
    main.main()


def test_temporarily_full_disk(shards: Path, tmp_path: Path, disk: Path) -> None:
    """Training continues, and lost metric lines and saves are logged; the result equals the uninterrupted run's."""
    calm = runs.arguments(shards, tmp_path / "calm", *settings(tmp_path))
    assert [rank.code for rank in ranked.bifrost(2, *calm)] == [0, 0]
    ended = ranked.run(train_while_full, 2, runs.arguments(shards, disk, *settings(tmp_path)), str(disk))
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    run, uninterrupted = disk / "tiny-mllm", tmp_path / "calm" / "tiny-mllm"
    assert "metrics.jsonl cannot be written, metric lines are lost: No space left on device" in ended[0].err
    assert "checkpoint of step 4 not saved" in ended[0].err
    lines = [line for line in runs.steps(uninterrupted) if line["step"] not in (4, 5)]
    assert [(line["step"], line["loss"]) for line in runs.steps(run)] == [
        (line["step"], line["loss"]) for line in lines
    ]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in (2, 6, 8)]
    for rank in range(2):
        file = f"checkpoints/step-00000008/rank-{rank:05d}.safetensors"
        assert (run / file).read_bytes() == (uninterrupted / file).read_bytes()
