"""Runs with a flow head: equal to plain PyTorch on any number of ranks, resumed to the bit, validated, replayed,
exported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import plain
import ranked
import runs
from bifrost.data import open_dataset
from bifrost.data.transforms import decode_image
from bifrost.recipes import load_recipe
from bifrost.trainer.checkpoint.export import export
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.errors import RunError

FLOW = ("branch.head=flow", "branch.flow_head={layers: 2, draws: 2, steps: 3}")
pytestmark = pytest.mark.multi


def train(shards: Path, runs_dir: Path, ranks: int, *overrides: str) -> Path:
    ended = ranked.bifrost(ranks, *runs.arguments(shards, runs_dir, *FLOW, *overrides))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return runs_dir / "tiny-mllm"


@pytest.mark.parametrize(
    "settings",
    [("branch.loss_tokens=all",), ("branch.loss_tokens=masked", "branch.draws=2", "activation_checkpointing=true")],
    ids=["all", "masked-draws"],
)
def test_ranks_equal_plain_pytorch(shards: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    settings = ("steps=5", "optimizer.lr=1e-2", *settings)
    wanted = plain.losses(load_recipe("tiny-mllm", runs.arguments(shards, tmp_path, *FLOW, *settings)[2:]))
    assert len(set(wanted)) == 5
    statistics = set()
    for ranks in (1, 2, 4):
        run = train(shards, tmp_path / str(ranks), ranks, *settings)
        np.testing.assert_allclose(runs.losses(run), wanted, rtol=1e-5)
        reader = Store(run / "checkpoints").newest_verified()
        assert reader is not None
        statistics.add(tuple(value for buffer in reader.buffers().values() for value in buffer.tolist()))
    assert len(statistics) == 1, "the latents' mean and deviation are equal to the bit on any number of ranks"


def test_statistics_are_those_of_the_data(shards: Path, tmp_path: Path) -> None:
    """Against all latents of the data, which here are fewer than are measured."""
    recipe = load_recipe("tiny-mllm", runs.arguments(shards, tmp_path, *FLOW, "steps=1")[2:])
    _, model = plain.loaded(recipe)
    data = open_dataset(f"{shards}/train-*.tar")
    assert len(data) <= 256
    pixels = [decode_image(data.read(*data.place(n)).image, recipe.data.image_size) for n in range(len(data))]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    latents = torch.cat([model.backbone.patch_latents(part) for part in images.split(16)]).flatten(0, 1).double()
    torch.testing.assert_close(model.head.mean, latents.mean(0).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.head.std, latents.std(0, correction=0).float(), rtol=1e-4, atol=1e-5)


def test_a_resumed_run_is_equal_to_the_bit(shards: Path, tmp_path: Path) -> None:
    settings = ("precision=bf16", "steps=8", "checkpoint.every=4", "ema.decay=0.9", "branch.draws=2")
    settings += (f"data.shards={shards}/train-0000[01].tar", f"validation.shards={shards}/train-0000[23].tar")
    settings += ("validation.every=4", "validation.samples=8")
    run = train(shards, tmp_path, 2, *settings)
    undisturbed = runs.steps(run)
    last = {file.name: file.read_bytes() for file in (run / "checkpoints/step-00000008").glob("*.safetensors")}
    shutil.rmtree(run / "checkpoints/step-00000008")
    train(shards, tmp_path, 2, *settings)
    resumed = runs.steps(run)
    exact = ("step", "loss", "loss_masked", "grad_norm", "data_digest")
    assert len([line for line in undisturbed if "val_loss" in line]) == 2
    assert [[line[key] for key in exact] for line in resumed] == [[line[key] for key in exact] for line in undisturbed]
    assert {file.name: file.read_bytes() for file in (run / "checkpoints/step-00000008").glob("*.safetensors")} == last
    assert "head.std" in load_file(run / "checkpoints/step-00000008/buffers.safetensors")
    assert [start["step"] for start in runs.events(run, "start")] == [0, 4]


def test_replayed_losses_are_those_of_the_run(shards: Path, tmp_path: Path) -> None:
    """With the statistics of a checkpoint, and for the first step with those measured again."""
    run = train(shards, tmp_path, 2, "steps=3", "checkpoint.every=2", "branch.draws=2", "optimizer.lr=1e-2")
    for step, weights in ((1, 0), (3, 2)):
        (ended,) = ranked.bifrost(1, "replay", str(run), "--json", f"--step={step}")
        assert ended.code == 0, ended.err
        found = json.loads(ended.out)
        assert found["weights_step"] == weights
        assert found["loss"] == pytest.approx(runs.steps(run)[step - 1]["loss"], rel=1e-5)


def test_exports_and_starts_from_them(shards: Path, tmp_path: Path) -> None:
    """The weights' own layout contains the statistics; the public one has no place for such a head."""
    run = train(shards, tmp_path, 1, "steps=1", "name=first", "ema=null").with_name("first")
    with pytest.raises(RunError, match=r"branch\.head is flow.*--format hf"):
        export(run, tmp_path / "public", "public")
    assert not (tmp_path / "public").exists()
    export(run, tmp_path / "hf", "hf", dtype=torch.float32)
    losses = []
    for number, source in enumerate((run, tmp_path / "hf")):
        train(shards, tmp_path, 1, "steps=1", f"init_from={source}", f"name=from-{number}")
        losses += runs.losses(tmp_path / f"from-{number}")
    assert losses[0] == losses[1] != runs.losses(run)[0]
