"""Storage that fails while base weights are read: asked again, then code 74 with the file's name."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from bifrost.data import DataLost, retry
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
    """(name of a file, list with how often it fails yet)."""
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
