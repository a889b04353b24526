"""Sockets over which workers pass tensors: their folder, and batches that cannot be sent."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing import current_process, util
from pathlib import Path

import pytest
import torch

from bifrost.data import DataError, Loader, LoaderSettings, Plan, Share, sockets


@pytest.fixture(autouse=True)
def no_folder_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The state of a new process; also ends a test that would hang."""
    monkeypatch.setattr(
        current_process(), "_config", {k: v for k, v in current_process()._config.items() if k != "tempdir"}
    )

    def late(*_: object) -> None:
        raise TimeoutError("it waits for ever")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def images(items: list) -> dict:
    return {"image": torch.stack([torch.from_numpy(item.image) for item in items])}


def unpicklable(items: list) -> dict:
    return {"image": lambda: items}


def loader(dataset, collate, workers: int = 1) -> Loader:
    return Loader(
        dataset,
        Plan(dataset.samples_per_shard, seed=3, shuffle_window=2),
        collate,
        Share(0, 1, 4, 2),
        range(2),
        LoaderSettings((8,), workers),
    )


@pytest.mark.parametrize("length", [76, 160, 250])
def test_long_temporary_folder(make_shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    folder = Path(f"{tempfile.gettempdir()}/{os.getpid()}-".ljust(length, "x"))
    folder.mkdir()
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        assert [batch.arrays["image"].shape for batch in loader(make_shards([4, 4]), images)] == [(2, 8, 8, 3)] * 4
        made = Path(util.get_temp_dir())
        assert made.stat().st_mode & 0o777 == 0o700 and made.parent == Path("/tmp")
        assert tempfile.gettempdir() == str(folder), "for everything else it stays"
    finally:
        folder.rmdir()


def test_no_short_folder_is_a_one_line_error(make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "SHORT", ("/nowhere",))
    folder = tempfile.mkdtemp(prefix="x" * 100)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    with pytest.raises(DataError, match=r"^TMPDIR=/.*: the loader's workers make sockets there.* at most 75 bytes"):
        loader(make_shards([4, 4]), images)
    assert len(list(loader(make_shards([4, 4]), images, workers=0))) == 4


def test_unsendable_batch_ends_the_loop(make_shards) -> None:
    """By default multiprocessing prints such an error and drops the batch, and the consumer waits forever."""
    with pytest.raises(DataError, match=r"^rank 0: a loader worker cannot send its batches: .*[Pp]ickle") as failed:
        list(loader(make_shards([4, 4]), unpicklable))
    assert "\n" not in str(failed.value)
