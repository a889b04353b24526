"""Run folders that cannot be written: refused with the cause at the start."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import ranked
import runs
import small_model

pytestmark = [pytest.mark.multi, pytest.mark.slow]


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
    """The one line that both ranks end with."""
    ended = ranked.bifrost(2, *arguments)
    assert [rank.code for rank in ended] == [2, 2], ended[0].err
    (line,) = ended[0].err.splitlines()
    assert line.startswith("error: ") and not ended[1].err
    return line


def test_a_full_disk_at_the_start(shards: Path, tmp_path: Path, disk: Path) -> None:
    fill(disk)
    line = refused(runs.arguments(shards, disk, *settings(tmp_path)))
    assert f"{disk}/tiny-mllm" in line and "No space left on device; free disk space" in line


def test_a_read_only_disk_at_the_start(shards: Path, tmp_path: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    line = refused(runs.arguments(shards, disk, *settings(tmp_path)))
    assert f"{disk}/tiny-mllm: Read-only file system; free disk space or mend" in line
