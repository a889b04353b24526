"""Storage that fails while base weights are read: retried, then exit code 74 with the file's name."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from bifrost.data import DataError, DataLost, retry
from bifrost.trainer.checkpoint import verification
from bifrost.trainer.checkpoint.reader import CheckpointReader
from bifrost.trainer.checkpoint.shard import Payload
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.errors import RunError
from bifrost.trainer.models import safetensors_files
from bifrost.trainer.models.weights import WeightFiles


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "_sleep", lambda seconds: None)
    save_file({"a": torch.arange(6.0)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture(params=["model-00001-of-00001.safetensors", "model.safetensors.index.json", "config.json"])
def failing(request, monkeypatch):
    """(name of a file, list with the number of failures left)."""
    name, left = request.param, [0]
    read_text, safe_open = Path.read_text, safetensors_files.safe_open

    def fails(file):
        if Path(file).name == name and left[0]:
            left[0] -= 1
            if name.endswith(".safetensors"):
                raise SafetensorError("Stale file handle (os error 116)")
            raise OSError(errno.EIO, "Input/output error", str(file))

    def text(self, *args, **options):
        fails(self)
        return read_text(self, *args, **options)

    def opened(file, **options):
        fails(file)
        return safe_open(file, **options)

    monkeypatch.setattr(Path, "read_text", text)
    monkeypatch.setattr(safetensors_files, "safe_open", opened)
    return name, left


def test_storage_that_recovers_costs_nothing(model, failing):
    _, left = failing
    left[0] = 2
    assert WeightFiles(model).full("a").tolist() == list(range(6)) and left == [0]


def test_storage_that_is_lost_is_one_line(model, failing):
    name, left = failing
    left[0] = 1000
    with pytest.raises(DataLost, match="check the storage or the network") as caught:
        WeightFiles(model)
    assert str(caught.value).startswith(f"{model / name}: ") and "\n" not in str(caught.value)


@pytest.fixture
def preads(monkeypatch):
    """Error numbers of the next `preadv` calls; a 0 among them is a short read."""
    errors, real = [], os.preadv

    def preadv(descriptor, buffers, offset):
        if errors and (number := errors.pop(0)):
            raise OSError(number, os.strerror(number))
        return real(descriptor, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return errors


def checkpoint(folder):
    weights = {"w": torch.arange(40.0)}
    slots = {"master": weights}
    Store(folder).save(1, Payload(0, 1, slots, {"w": (40,)}, {"updates": 1}, {"count": torch.arange(3)}))
    return CheckpointReader(Store(folder).folder(1))


READS = {
    "a slice": lambda files, reader: files.flat("a", 2, 5).tolist() == [2, 3, 4],
    "a tensor": lambda files, reader: files.full("a").tolist() == list(range(6)),
    "a hash": lambda files, reader: len(files.content_hash(["a"])) == 64,
    "a checkpoint's slice": lambda files, reader: reader.read("master", "w", 7, 33).tolist() == list(range(7, 33)),
    "a checkpoint's buffers": lambda files, reader: reader.buffers()["count"].tolist() == [0, 1, 2],
}


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("read", READS)
def test_a_read_that_fails_after_opening_is_repeated(model, preads, read, error):
    files, reader = WeightFiles(model), checkpoint(model / "run")
    expected = files.content_hash(["a"])
    preads += [error, 0, error]
    assert READS[read](files, reader)
    assert not preads and files.content_hash(["a"]) == expected


@pytest.mark.parametrize("read", READS)
def test_storage_that_is_lost_after_opening_is_one_line(model, preads, read):
    files, reader = WeightFiles(model), checkpoint(model / "run")
    preads += [errno.EIO] * 1000
    with pytest.raises(DataLost, match=r"^/.*\.safetensors: Input/output error; check the storage"):
        READS[read](files, reader)


def test_an_error_that_stays_is_not_repeated(model, preads):
    files = WeightFiles(model)
    preads += [errno.EACCES] * 2
    with pytest.raises(DataError, match=r"\.safetensors: Permission denied; check the permissions"):
        files.full("a")
    assert len(preads) == 1


def test_a_file_that_becomes_shorter_is_named(model):
    """Memory-mapped, this ended the process with SIGBUS."""
    files = WeightFiles(model)
    file = model / "model-00001-of-00001.safetensors"
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(RunError, match=r"safetensors: ends 8 bytes early; fetch or write it again"):
        files.full("a")


def test_a_file_that_was_replaced_is_not_read_on(model, preads):
    """Offsets come from the old header: the file now has other bytes there."""
    files = WeightFiles(model)
    file = model / "model-00001-of-00001.safetensors"
    save_file({"a": torch.zeros(6)}, model / "other")
    (model / "other").replace(file)
    preads.append(errno.ESTALE)
    with pytest.raises(DataLost, match=r"safetensors: replaced while being read; start again"):
        files.full("a")


def test_reads_of_a_manifest_and_its_files_are_retried(model, monkeypatch):
    """A checkpoint that is briefly unreadable is not replaced by an older one."""
    checkpoint(model / "run")
    left, real = [2, 2], Path.read_bytes
    is_intact = verification.is_intact

    def read_bytes(self):
        if self.name == "manifest.json" and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self)

    def hashed(path, spans):
        if left[1]:
            left[1] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return is_intact(path, spans)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(verification, "is_intact", hashed)
    assert Store(model / "run").newest_verified().step == 1 and left == [0, 0]
