import errno
import json
import logging
import os

import pytest
import torch
from safetensors.torch import load_file

from bifrost.trainer.checkpoint import verification
from bifrost.trainer.checkpoint.layout import local_range
from bifrost.trainer.checkpoint.manifest import read_manifest
from bifrost.trainer.checkpoint.shard import Payload
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.errors import RunError

SHAPES = {"layer.weight": (5, 3), "layer.bias": (3,), "scale": (), "empty": (0, 4)}
FILES = ["buffers.safetensors", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors", "state.json"]


def test_save_and_read_back(tmp_path, save, assert_holds):
    assert save(tmp_path / "checkpoints", 200, ranks=2) == [None, None]
    store = Store(tmp_path / "checkpoints")
    assert store.steps() == [200]
    assert store.verify(200) == []
    reader = store.newest_verified()
    assert (reader.step, reader.ranks, reader.slots) == (200, 2, ["master", "exp_avg"])
    assert reader.shapes == SHAPES
    assert_holds(reader, 200)
    assert sorted(os.listdir(reader.folder)) == FILES
    assert os.listdir(store.root) == ["step-00000200"]


def test_files_are_plain_safetensors(tmp_path, save, slices):
    save(tmp_path, 1, ranks=2)
    held = load_file(tmp_path / "step-00000001" / "rank-00001.safetensors")
    for slot, parameters in slices(1, 2, seed=1).items():
        for name, tensor in parameters.items():
            assert torch.equal(held[f"{slot}/{name}"], tensor)


@pytest.mark.parametrize("saved_ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_reading_at_another_world_size(tmp_path, save, whole, saved_ranks, ranks):
    save(tmp_path, 1, ranks=saved_ranks)
    reader = Store(tmp_path).newest_verified()
    for slot, parameters in whole(1).items():
        for name, tensor in parameters.items():
            for rank in range(ranks):
                lo, hi = local_range(tensor.numel(), rank, ranks)
                assert torch.equal(reader.read(slot, name, lo, hi), tensor.flatten()[lo:hi])


def test_reader_names_what_it_lacks(tmp_path, save):
    save(tmp_path, 1)
    reader = Store(tmp_path).newest_verified()
    with pytest.raises(RunError, match="holds no ema, only master, exp_avg"):
        reader.full("ema", "scale")
    with pytest.raises(RunError, match="holds no parameter head"):
        reader.read("master", "head", 0, 1)


def test_no_buffers_no_file(tmp_path):
    Store(tmp_path).save(1, Payload(0, 1, {"master": {"a": torch.ones(2)}}, {"a": (2,)}, {}, {}))
    reader = Store(tmp_path).newest_verified()
    assert reader.buffers() == {}
    assert sorted(os.listdir(reader.folder)) == ["manifest.json", "rank-00000.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_anywhere_is_refused_by_name(tmp_path, save, assert_holds, caplog, name):
    save(tmp_path, 1, ranks=2)
    save(tmp_path, 2, ranks=2)
    path = tmp_path / "step-00000002" / name
    sound = path.read_bytes()
    stride = 1 if len(sound) < 100 else 7
    for position in [*range(0, len(sound), stride), len(sound) - 1]:
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 4]) + sound[position + 1 :])
        problems = Store(tmp_path).verify(2)
        assert problems, position
        assert f"step-00000002/{name}: " in problems[0]
    reader = Store(tmp_path).newest_verified()
    assert f"step-00000002/{name}: " in caplog.text
    assert_holds(reader, 1)


@pytest.mark.parametrize("name", FILES)
def test_missing_truncated_and_long_files(tmp_path, save, name):
    save(tmp_path, 2, ranks=2)
    store = Store(tmp_path)
    path = tmp_path / "step-00000002" / name
    sound = path.read_bytes()
    path.write_bytes(sound[:-1])
    assert ("damaged" if name == "manifest.json" else "truncated") in store.verify(2)[0]
    path.write_bytes(sound + b"\n")
    assert ("damaged" if name == "manifest.json" else "too long") in store.verify(2)[0]
    path.unlink()
    assert store.verify(2) == [f"step-00000002/{name}: missing"]
    assert store.newest_verified() is None


def test_manifest_of_a_later_format_and_a_renamed_folder(tmp_path, save):
    save(tmp_path, 2)
    folder = tmp_path / "step-00000002"
    folder.rename(tmp_path / "step-00000003")
    assert Store(tmp_path).verify(3) == ["step-00000003/manifest.json: is of step 2"]
    path = tmp_path / "step-00000003" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3}))
    with pytest.raises(RunError, match=r"manifest.json: format 3, this version reads formats 1 and 2"):
        read_manifest(path.parent)


def test_newest_verified_skips_and_agrees_on_every_rank(tmp_path, save, run_ranks, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step, ranks=3)
    path = tmp_path / "step-00000003" / "rank-00002.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    readers = run_ranks(4, lambda rank, gather: Store(tmp_path).newest_verified((), rank, 4, gather))
    assert [reader.step for reader in readers] == [2] * 4
    assert len(caplog.records) == 1  # only rank 0 logs it
    assert "step-00000003/rank-00002.safetensors: damaged" in caplog.text
    assert Store(tmp_path).newest_verified(skip={2}).step == 1


def test_shares_cover_every_file_once(tmp_path, save, monkeypatch):
    save(tmp_path, 1, ranks=5)
    hashed, real = [], verification.is_intact
    monkeypatch.setattr(verification, "is_intact", lambda path, _: hashed.append(path.name) or real(path, _))
    for rank in range(3):
        assert Store(tmp_path).verify(1, (rank, 3)) == []
    assert len(hashed) == len({*hashed}) == 7


def test_failure_on_one_rank_is_the_same_error_on_all(tmp_path, save, monkeypatch, assert_holds):
    save(tmp_path, 1, ranks=3)
    real = os.fsync

    def full_disk(descriptor):
        if "rank-00001" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    errors = save(tmp_path, 2, ranks=3)
    monkeypatch.undo()
    assert all(isinstance(error, RunError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert "rank 1 could not write" in str(errors[0])
    assert "rank-00001.safetensors: No space left on device" in str(errors[0])
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert_holds(Store(tmp_path).newest_verified(), 1)
    assert save(tmp_path, 2, ranks=3) == [None] * 3


def test_failure_of_the_commit_reaches_all(tmp_path, save, monkeypatch):
    monkeypatch.setattr("bifrost.trainer.checkpoint.manifest.Manifest.write", lambda *_: 1 / 0)
    errors = save(tmp_path, 2, ranks=2)
    assert [str(error) for error in errors] == ["rank 0 could not commit the checkpoint: division by zero"] * 2
    assert os.listdir(tmp_path) == []


def test_a_read_only_folder_is_named(tmp_path, save):
    (tmp_path / "file").write_text("")
    (error,) = save(tmp_path / "file", 1)
    assert isinstance(error, RunError)
    assert f"could not prepare the checkpoint: {tmp_path / 'file'}" in str(error)


def test_nodes_that_do_not_share_the_disk(tmp_path, run_ranks, slices):
    def work(rank, gather):
        Store(tmp_path / f"node-{rank}").save(1, Payload(rank, 2, slices(rank, 2), SHAPES, {}, {}), gather)

    (tmp_path / "node-1").mkdir()
    errors = run_ranks(2, work)
    assert "rank-00001.safetensors as rank 0 sees it: missing" in str(errors[0])
    assert "on a disk that all nodes share?" in str(errors[1])


@pytest.mark.parametrize(
    ("slots", "match"),
    [
        ({"master": {"a": torch.ones(3)}}, "master/a has 3 elements, its slice has 2"),
        ({"master": {"b": torch.ones(2)}}, "do not name the same parameters: a, b"),
        ({"master": {"a": torch.ones(2).half()}}, "not a flat fp32 slice"),
    ],
)
def test_wrong_slices(tmp_path, slots, match):
    with pytest.raises(RunError, match=match):
        Store(tmp_path).save(1, Payload(0, 1, slots, {"a": (2,)}, {}, {}))
    assert os.listdir(tmp_path) == []


def test_saving_a_step_again(tmp_path, save, assert_holds):
    save(tmp_path, 1, ranks=2, seed=1)
    save(tmp_path, 1, ranks=2, seed=2)
    assert_holds(Store(tmp_path).newest_verified(), 1)  # the one that verifies is kept
    (tmp_path / "step-00000001" / "state.json").write_text("{}")
    save(tmp_path, 1, ranks=2, seed=2)
    assert_holds(Store(tmp_path).newest_verified(), 2)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_prune_keeps_the_newest(tmp_path, save):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    store = Store(tmp_path)
    assert store.prune(2) == [1, 2]
    assert store.prune(2) == []
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]


def test_prune_never_removes_the_only_sound_one(tmp_path, save, assert_holds):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for step in (3, 4):
        (tmp_path / f"step-{step:08d}" / "state.json").write_text("{}")
    store = Store(tmp_path)
    assert store.prune(2) == [1]
    assert_holds(store.newest_verified(), 2)


def test_prune_after_a_save_reads_nothing_back(tmp_path, monkeypatch):
    store = Store(tmp_path)
    for step in (1, 2, 3):
        store.save(step, Payload(0, 1, {"master": {"a": torch.ones(2)}}, {"a": (2,)}, {}, {}))
    monkeypatch.setattr(Store, "verify", lambda *_: pytest.fail("verified"))
    assert store.prune(1) == [1, 2]


def test_removal_that_fails_is_logged(tmp_path, save, monkeypatch, caplog):
    for step in (1, 2):
        save(tmp_path, step)
    monkeypatch.setattr("shutil.rmtree", lambda path: (_ for _ in ()).throw(OSError("busy")))
    with caplog.at_level(logging.WARNING):
        assert Store(tmp_path).prune(1) == []
    assert "checkpoint of step 1 could not be removed: busy" in caplog.text
    assert Store(tmp_path).steps() == [2]  # half removed is not a checkpoint


def test_opening_touches_nothing_and_saving_sweeps(tmp_path, save):
    (tmp_path / ".step-00000007.partial").mkdir()
    (tmp_path / ".step-00000007.partial" / "manifest.json").write_text("{}")
    assert Store(tmp_path).newest_verified() is None
    assert Store(tmp_path).steps() == []
    assert os.listdir(tmp_path) == [".step-00000007.partial"]
    save(tmp_path, 8)
    assert os.listdir(tmp_path) == ["step-00000008"]
