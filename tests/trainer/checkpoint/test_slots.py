"""Who loads one slot reads and verifies one slot, and the ranks share that: counted in bytes that the process read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import xxhash

import first_version
from bifrost.trainer.checkpoint.layout import local_range
from bifrost.trainer.checkpoint.manifest import read_manifest
from bifrost.trainer.checkpoint.shard import Payload
from bifrost.trainer.checkpoint.store import Store

SLOTS = ("master", "exp_avg", "exp_avg_sq", "ema")
NUMBERS = 1_000_000
SLOT_BYTES = 4 * NUMBERS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, run_ranks) -> Path:
    """Four slots of 4 MB, saved by four ranks."""
    folder = tmp_path_factory.mktemp("run")
    values = torch.arange(NUMBERS).float()

    def save(rank, gather):
        mine = values[slice(*local_range(NUMBERS, rank, 4))]
        slots = {slot: {"w": mine + place} for place, slot in enumerate(SLOTS)}
        Store(folder).save(1, Payload(rank, 4, slots, {"w": (NUMBERS,)}, {}, {"mean": torch.ones(2)}), gather)

    assert run_ranks(4, save) == [None] * 4
    return folder


def bytes_read() -> int:
    """By this process's read calls; memory-mapped files do not count."""
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(line.split()[1])


def reading(work) -> float:
    """Slots' worth of bytes that `work` reads."""
    before = bytes_read()
    work()
    return (bytes_read() - before) / SLOT_BYTES


def test_one_slot_is_verified_alone(checkpoint: Path) -> None:
    assert reading(lambda: Store(checkpoint).newest_verified()) == pytest.approx(4, abs=0.05)
    for slots in (("master",), ("ema", "master"), ("absent", "exp_avg")):
        assert reading(lambda slots=slots: Store(checkpoint).newest_verified(slots=slots)) == pytest.approx(1, abs=0.05)


def test_ranks_share_the_work(checkpoint: Path, run_ranks) -> None:
    """Four ranks together read one slot once, whatever each of them loads."""

    def find(rank, gather):
        return Store(checkpoint).newest_verified((), rank, 4, gather, ("master",)).step

    assert reading(lambda: run_ranks(4, find)) == pytest.approx(1, abs=0.05)
    assert run_ranks(4, find) == [1] * 4


@pytest.mark.parametrize("slot", ["header", *SLOTS])
def test_damage_is_seen_where_it_is_loaded(checkpoint: Path, tmp_path: Path, slot: str) -> None:
    file = "rank-00002.safetensors"
    span = read_manifest(checkpoint / "step-00000001").files[file].spans[slot]  # type: ignore[index]
    place = tmp_path / "step-00000001"
    place.mkdir()
    for one in (checkpoint / "step-00000001").iterdir():
        (place / one.name).write_bytes(one.read_bytes())
    content = bytearray((place / file).read_bytes())
    content[span.start + span.size // 2] ^= 1
    (place / file).write_bytes(content)
    (problem,) = Store(tmp_path).verify(1)
    assert problem.startswith(f"step-00000001/{file}: damaged")
    for wanted in SLOTS:
        seen = bool(Store(tmp_path).verify(1, slots=(wanted,)))
        assert seen == (slot in ("header", wanted))
    half_seen = Store(tmp_path)
    if slot != "master":
        assert (half_seen.verify(1, slots=("master",)) == []) == (slot != "header")
    assert half_seen.verify(1), "what was verified in part is not taken for whole"


@pytest.mark.parametrize("separate", [True, False])
def test_a_checkpoint_of_format_1(checkpoint: Path, tmp_path: Path, separate: bool) -> None:
    """SHA-256 of each file, and in later ones of each slot: still verified, where it is loaded, and read."""
    place = tmp_path / "step-00000001"
    shutil.copytree(checkpoint / place.name, place)
    first_version.write_manifest(place, read_manifest(place), separate)
    assert Store(tmp_path).verify(1) == []
    expected = 1 if separate else 4
    assert reading(lambda: Store(tmp_path).newest_verified(slots=("master",))) == pytest.approx(expected, abs=0.05)
    reader = Store(tmp_path).newest_verified()
    assert reader is not None and torch.equal(reader.full("ema", "w"), torch.arange(NUMBERS).float() + 3)
    content = bytearray((place / "rank-00002.safetensors").read_bytes())
    content[-1] ^= 1
    (place / "rank-00002.safetensors").write_bytes(content)
    (problem,) = Store(tmp_path).verify(1)
    assert problem.startswith("step-00000001/rank-00002.safetensors: damaged")
    assert bool(Store(tmp_path).verify(1, slots=("master",))) != separate


def test_hashes_are_the_published_functions(checkpoint: Path) -> None:
    place = checkpoint / "step-00000001"
    for name, entry in read_manifest(place).files.items():
        content = (place / name).read_bytes()
        for span in entry.spans.values():
            digest = xxhash.xxh3_128_hexdigest(content[span.start : span.start + span.size])
            assert span.hash == f"xxh3_128:{digest}"
        assert sum(span.size for span in entry.spans.values()) == len(content)


def test_a_manifest_that_covers_a_file_in_part_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """A byte without a hash would be loaded unverified; the manifest's own hash is right."""
    place = tmp_path / "step-00000001"
    shutil.copytree(checkpoint / place.name, place)
    for change in ({"size": 0}, {"start": 8}, {"hash": "crc32:00000000"}):
        manifest = read_manifest(checkpoint / place.name)
        files = manifest.model_dump(mode="json")["files"]
        files["rank-00001.safetensors"]["spans"]["master"].update(change)
        body = {**manifest.model_dump(mode="json"), "files": files}
        body["sha256"] = first_version.sha256(json.dumps(body).encode())
        (place / "manifest.json").write_text(json.dumps(body, indent=1) + "\n")
        assert Store(tmp_path).verify(1) == ["step-00000001/manifest.json: damaged, it is not a manifest"]
