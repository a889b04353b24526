"""Tensors that are verified while they are loaded: every byte is read once, and damage is still seen before use."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import first_version
from bifrost.trainer.checkpoint import reader as reader_module
from bifrost.trainer.checkpoint.layout import local_range
from bifrost.trainer.checkpoint.manifest import read_manifest
from bifrost.trainer.checkpoint.reader import CheckpointReader
from bifrost.trainer.checkpoint.shard import Payload
from bifrost.trainer.checkpoint.state import restore
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.errors import RunError

SLOTS = ("master", "exp_avg", "exp_avg_sq")
SHAPES = {"w": (1000, 501), "odd": (7,), "scalar": (), "empty": (0, 4)}
RANKS = 3
BYTES = 4 * len(SLOTS) * sum(torch.Size(shape).numel() for shape in SHAPES.values())


def values(slot: str, name: str) -> torch.Tensor:
    return torch.arange(torch.Size(SHAPES[name]).numel()) + 0.5 + 7 * SLOTS.index(slot)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, run_ranks) -> Path:
    """A run's checkpoints of steps 1 and 2, which are equal."""
    folder = tmp_path_factory.mktemp("run")

    def save(rank, gather):
        for step in (1, 2):
            slots = {
                slot: {
                    name: each[slice(*local_range(len(each), rank, RANKS))]
                    for name in SHAPES
                    for each in [values(slot, name)]
                }
                for slot in SLOTS
            }
            Store(folder).save(step, Payload(rank, RANKS, slots, SHAPES, {}, {"mean": torch.ones(2)}), gather)

    assert run_ranks(RANKS, save) == [None] * RANKS
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def load(reader: CheckpointReader, rank: int, ranks: int, dtype: torch.dtype = torch.float32) -> str | None:
    """What a rank finds wrong while it loads all slots; without a problem, the values are compared."""
    for slot in reversed(SLOTS):
        ranges = {name: local_range(torch.Size(shape).numel(), rank, ranks) for name, shape in SHAPES.items()}
        slices = {name: (torch.full((hi - lo,), -1, dtype=dtype), lo) for name, (lo, hi) in reversed(ranges.items())}
        if problem := reader.load(slot, slices):
            return problem
        for name, (tensor, lo) in slices.items():
            assert torch.equal(tensor, values(slot, name)[lo : lo + len(tensor)].to(dtype)), (slot, name)
    return None


def newest(folder: Path, ranks: int, run_ranks, dtype: torch.dtype = torch.float32) -> list:
    """On every rank, the step that is chosen without reading the tensors, and what loading it finds."""

    def find(rank, gather):
        reader = Store(folder).newest_verified((), rank, ranks, gather, while_loaded=True)
        assert reader is not None and (reader.own == rank) == (ranks == RANKS)
        return reader.step, load(reader, rank, ranks, dtype)

    return run_ranks(ranks, find)


def bytes_read() -> int:
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(line.split()[1])


@pytest.mark.parametrize("block", [1 << 18, 1000])
def test_every_byte_is_read_once(saved: Path, run_ranks, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(reader_module, "_BLOCK", block)
    before = bytes_read()
    assert newest(saved, RANKS, run_ranks) == [(2, None)] * RANKS
    assert bytes_read() - before == pytest.approx(BYTES, rel=0.02)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_on_another_number_of_ranks_the_hashes_come_first(saved: Path, run_ranks, ranks: int) -> None:
    before = bytes_read()
    assert newest(saved, ranks, run_ranks) == [(2, None)] * ranks
    assert bytes_read() - before == pytest.approx(2 * BYTES, rel=0.02)


def test_a_checkpoint_of_format_1(copied: Path, run_ranks) -> None:
    for step in (1, 2):
        folder = copied / f"step-{step:08d}"
        first_version.write_manifest(folder, read_manifest(folder))
    before = bytes_read()
    assert newest(copied, RANKS, run_ranks) == [(2, None)] * RANKS
    assert bytes_read() - before == pytest.approx(BYTES, rel=0.02)
    flip(copied / "step-00000002" / "rank-00002.safetensors", -1)
    assert [bool(problem) for _, problem in newest(copied, RANKS, run_ranks)] == [False, False, True]


def test_into_another_type(saved: Path, run_ranks) -> None:
    """As into another device's memory: through memory that can be read into."""
    assert newest(saved, RANKS, run_ranks, torch.float64) == [(2, None)] * RANKS


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("place", ["first", "last"])
def test_damage_is_found_by_its_rank(copied: Path, run_ranks, slot: str, place: str) -> None:
    file = "rank-00001.safetensors"
    span = read_manifest(copied / "step-00000002").files[file].spans[slot]
    flip(copied / "step-00000002" / file, span.start if place == "first" else span.start + span.size - 1)
    problem = f"step-00000002/{file}: damaged, its content does not match the hash in the manifest"
    assert newest(copied, RANKS, run_ranks) == [(2, None), (2, problem), (2, None)]


@pytest.mark.parametrize("file", ["rank-00001.safetensors", "state.json", "buffers.safetensors", "manifest.json"])
def test_damage_outside_of_tensors_is_found_before_loading(copied: Path, run_ranks, file: str) -> None:
    flip(copied / "step-00000002" / file, 1)
    assert newest(copied, RANKS, run_ranks) == [(1, None)] * RANKS


def test_nothing_else_reads_what_is_not_verified(saved: Path) -> None:
    reader = CheckpointReader(saved / "step-00000002", own=0)
    with pytest.raises(AssertionError, match="not verified"):
        reader.full("master", "w")


def test_tensors_that_the_file_holds_otherwise(saved: Path) -> None:
    """A bug, not damage: no byte may be left without a hash."""
    reader = CheckpointReader(saved / "step-00000002", own=0)
    with pytest.raises(AssertionError, match="not all slices"):
        reader.load("master", {"w": (torch.empty(167_000), 0)})
    with pytest.raises(AssertionError, match="not the slices"):
        reader.load("master", {"w": (torch.empty(5), 0)})


def test_parameters_of_another_shape_are_refused(saved: Path) -> None:
    class Engine:
        def trainable(self):
            return {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in {**SHAPES, "odd": (8,)}.items()}

    reader = CheckpointReader(saved / "step-00000002")
    with pytest.raises(RunError, match=r"step-00000002: odd has shape \(7,\), expected \(8,\); was the recipe changed"):
        restore(Engine(), None, reader, 1)  # type: ignore[arg-type]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
