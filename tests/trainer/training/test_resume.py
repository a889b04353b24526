"""A resumed run equals the run that never stopped."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import first_version
import ranked
import runs
from bifrost.trainer.checkpoint.reader import CheckpointReader
from bifrost.trainer.checkpoint.store import Store

pytestmark = pytest.mark.multi


def train(shards: Path, runs_dir: Path, ranks: int, *overrides: str) -> list[ranked.Rank]:
    ended = ranked.bifrost(ranks, *runs.arguments(shards, runs_dir, *overrides))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return ended


@pytest.mark.parametrize(("precision", "begun"), [("fp32", "by this version"), ("bf16", "by the first version")])
def test_same_ranks_to_the_bit(shards: Path, tmp_path: Path, precision: str, begun: str) -> None:
    settings = (f"precision={precision}", "steps=10", "checkpoint.every=4", "ema.decay=0.9", "data.workers=1")
    settings += ("branch.draws=2",) if begun == "by this version" else ()
    train(shards, tmp_path, 2, *settings)
    run = tmp_path / "tiny-mllm"
    undisturbed = runs.steps(run)
    last = (run / "checkpoints/step-00000010/rank-00001.safetensors").read_bytes()
    for step in (8, 10):
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")

    if begun == "by the first version":
        first_version.age(run)
        ended = ranked.bifrost(2, "resume", str(run))
        assert [rank.code for rank in ended] == [0, 0], ended[0].err
        assert not runs.events(run, "settings_changed")
    else:
        train(shards, tmp_path, 2, *settings)
    resumed = runs.steps(run)
    assert [line["step"] for line in resumed] == list(range(1, 11))
    exact = ("loss", "loss_masked", "grad_norm", "lr", "samples", "data_digest", "skipped_steps")
    assert [[line[key] for key in exact] for line in resumed] == [[line[key] for key in exact] for line in undisturbed]
    assert (run / "checkpoints/step-00000010/rank-00001.safetensors").read_bytes() == last
    assert [start["step"] for start in runs.events(run, "start")] == [0, 4]


def test_any_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    """2 -> 1 -> 4 -> 2 ranks, four steps each; the learning rate is constant, so `steps` may grow."""
    train(shards, tmp_path / "whole", 2, "steps=16")
    for ranks, steps in ((2, 4), (1, 8), (4, 12), (2, 16)):
        train(shards, tmp_path / "parts", ranks, f"steps={steps}")
    whole, parts = tmp_path / "whole/tiny-mllm", tmp_path / "parts/tiny-mllm"
    np.testing.assert_allclose(runs.losses(parts), runs.losses(whole), rtol=0, atol=1e-5)
    assert [s["data_digest"] for s in runs.steps(parts)] == [s["data_digest"] for s in runs.steps(whole)]


def test_groups_keep_their_own_decay(shards: Path, tmp_path: Path) -> None:
    """After a resume on another number of ranks norms still do not decay and matrices do."""
    heavy = (*runs.TINY, "optimizer.weight_decay=5", "optimizer.lr=1e-2", "optimizer.warmup_steps=0")
    train(shards, tmp_path, 1, "steps=1", *heavy)
    train(shards, tmp_path, 2, "steps=6", *heavy)
    reader = Store(tmp_path / "tiny-mllm/checkpoints").newest_verified()
    assert reader is not None
    start = CheckpointReader(Store(tmp_path / "tiny-mllm/checkpoints").folder(1))

    def kept(name: str) -> float:
        return float(reader.full("master", name).norm() / start.full("master", name).norm())

    # Five decays of 1 - 0.01 * 5 leave 0.77 of a weight.
    assert all(kept(name) > 0.9 for name in reader.shapes if name.endswith("norm.weight"))
    assert kept("branch.layers.0.mlp.up_proj.weight") < 0.9


def test_finished_run_is_left_alone(shards: Path, tmp_path: Path) -> None:
    train(shards, tmp_path, 1, "steps=2")
    saved = tmp_path / "tiny-mllm/checkpoints/step-00000002/manifest.json"
    before = (saved.read_bytes(), saved.stat().st_mtime_ns)
    ended = train(shards, tmp_path, 1, "steps=2")
    assert (saved.read_bytes(), saved.stat().st_mtime_ns) == before
    assert "done: 2 steps" in ended[0].out
    assert len(runs.steps(tmp_path / "tiny-mllm")) == 2


def test_checkpoint_holds_trainables_alone(shards: Path, tmp_path: Path) -> None:
    """Decision 5: frozen weights are never state; the size shows it: 3 fp32 slices per trainable parameter."""
    train(shards, tmp_path, 2, "steps=1", "ema=null", *runs.TINY)
    folder = tmp_path / "tiny-mllm/checkpoints/step-00000001"
    size = sum(file.stat().st_size for file in folder.glob("rank-*.safetensors"))
    manifest = json.loads((folder / "manifest.json").read_text())
    trainable = sum(int(np.prod(shape)) for shape in _shapes(manifest))
    assert 12 * trainable <= size <= 12 * trainable * 1.02


def _shapes(manifest: dict) -> list:
    shapes = manifest.get("shapes") or manifest["parameters"]
    return list(shapes.values()) if isinstance(shapes, dict) else [entry["shape"] for entry in shapes]
