"""`bifrost bench checkpoint`: every format saves and loads the same state, and a wrong load is refused."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

import ranked
from bifrost.trainer.bench import checkpoint
from bifrost.trainer.bench.checkpoint_formats import Saving
from bifrost.trainer.distributed.process_group import Ranks
from bifrost.trainer.errors import RunError

FORMATS = ["bifrost", "DeepSpeed", "DCP", "DCP async", "DCP async, stager kept"]


@pytest.mark.multi
@pytest.mark.slow
def test_all_formats_on_two_ranks(tmp_path: Path) -> None:
    options = ["--size", "3MiB", "--rounds", "1", "--folder", str(tmp_path), "--out", str(tmp_path / "out")]
    first, second = ranked.bifrost(2, "bench", "checkpoint", *options)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "3 MiB on 2 ranks, 1 round" in first.out and second.out == ""
    record = json.loads((tmp_path / "out" / "checkpoint.json").read_text())
    assert (record["bytes"], record["ranks"], list(record["seconds"])) == (3 * 2**20, 2, FORMATS)
    for seconds in record["seconds"].values():
        assert all(len(seconds[key]) == 1 and seconds[key][0] > 0 for key in checkpoint.MEASURES)
    own, other = record["seconds"]["bifrost"], record["seconds"]["DCP"]
    assert record["ratios"]["load / DCP's"] == [own["load_s"][0] / other["load_s"][0]]
    assert record["formats"]["bifrost"] == {"flushed": True, "verified": True}
    assert os.listdir(tmp_path) == ["out"], "the measured checkpoints are removed"


class Lossy:
    """A format that loses one value."""

    name, flushed, verified = "lossy", False, False

    def __init__(self, values: torch.Tensor, at: int | None) -> None:
        self.values, self.at = values, at

    def ready(self):
        return open(os.devnull)

    def save(self, folder: Path) -> Saving:
        torch.save(self.values, folder / "values")
        return Saving(lambda: time.sleep(0.3), lambda: time.sleep(0.2))

    def load(self, folder: Path) -> None:
        self.values.copy_(torch.load(folder / "values"))
        if self.at is not None:
            self.values[self.at] += 1


class State(checkpoint.Expected):
    """The values of one tensor."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self._base, self._made = torch.randn(len(values)), torch.empty(len(values))

    def _tensors(self) -> list[torch.Tensor]:
        return [self.values]


class NoPasses(checkpoint.Passes):
    def run(self) -> float:
        return 1e-3


def test_a_load_of_other_values_is_refused(tmp_path: Path) -> None:
    values, ranks, passes = torch.zeros(9), Ranks(0, 1, torch.device("cpu")), NoPasses(torch.device("cpu"))
    found = checkpoint.measure(Lossy(values, None), tmp_path / "place", ranks, State(values), passes)
    assert found["call_s"] < 0.2 <= found["save_s"] and 0.29 < found["stall_s"] < 0.5 and values.any()
    with pytest.raises(RunError, match="lossy loaded other values than were saved"):
        checkpoint.measure(Lossy(values, 8), tmp_path / "place", ranks, State(values), passes)


def test_a_cold_load_finds_nothing_in_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 16))

    def cached() -> bool:
        handle = os.open(file, os.O_RDONLY)
        try:
            return os.preadv(handle, [bytearray(4096)], 8192, os.RWF_NOWAIT) == 4096
        except BlockingIOError:
            return False
        except OSError:
            pytest.skip("this file system cannot answer without reading")
        finally:
            os.close(handle)

    assert cached()
    checkpoint.drop_from_page_cache(tmp_path)
    assert not cached()


@pytest.mark.parametrize("text", ["768", "0MiB", "1KiB", "-1GiB", "4 GiB", ""])
def test_a_size_that_is_none(text: str) -> None:
    with pytest.raises(RunError, match="give the bytes of the state, such as 768MiB or 4GiB"):
        checkpoint.parse_size(text)


def test_sizes() -> None:
    assert checkpoint.parse_size("768MiB") == 768 * 2**20
    assert checkpoint.parse_size("1.5GiB") == 3 * 2**29
