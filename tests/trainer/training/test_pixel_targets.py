"""Runs on pixels or VAE latents instead of native latents: equal to plain PyTorch on any number of ranks, resumed to
the bit, scored, and refused where only native latents fit."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import plain
import ranked
import runs
from bifrost.recipes import RecipeError, load_recipe
from bifrost.trainer.checkpoint.export import export
from bifrost.trainer.cli.main import app
from bifrost.trainer.errors import RunError
from bifrost.trainer.inference.latent_decoder import load_decoder

pytestmark = pytest.mark.multi
SIZE_480 = "flux.image_size=480"
ENCODER = ("branch.targets=encoder", "branch.encoder=builtin:tiny")
VAE = ("branch.targets=vae", "flux.path=builtin:tiny-flux", "flux.image_size=32")


def train(shards: Path, runs_dir: Path, ranks: int, *overrides: str) -> Path:
    ended = ranked.bifrost(ranks, *runs.arguments(shards, runs_dir, *overrides))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return runs_dir / "tiny-mllm"


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("branch.targets=pca",),
        ("branch.targets=random", "branch.head=flow"),
        (*VAE, "backbone.placement=replicated"),
        (*VAE, "backbone.placement=sharded", "zero.persistence_threshold=0"),
        (*ENCODER, "backbone.placement=sharded", "zero.persistence_threshold=0"),
    ],
    ids=["pca", "random-flow", "vae", "vae-sharded", "encoder-sharded"],
)
def test_ranks_equal_plain_pytorch(shards: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    settings = (*runs.TINY, "steps=4", "optimizer.lr=1e-2", *settings)
    wanted = plain.losses(load_recipe("tiny-mllm", runs.arguments(shards, tmp_path, *settings)[2:]))
    native = plain.losses(load_recipe("tiny-mllm", runs.arguments(shards, tmp_path, *runs.TINY, "steps=1")[2:]))
    assert len(set(wanted)) == 4 and wanted[0] != native[0]
    for ranks in (1, 2, 4):
        run = train(shards, tmp_path / str(ranks), ranks, *settings)
        np.testing.assert_allclose(runs.losses(run), wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("branch.targets=pca",), VAE, ENCODER], ids=["pca", "vae", "encoder"])
def test_a_resumed_run_is_equal_to_the_bit(shards: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    settings = (*runs.TINY, *targets, "precision=bf16", "steps=6", "checkpoint.every=3", "ema.decay=0.9")
    settings = (*settings, "backbone.placement=sharded")
    run = train(shards, tmp_path, 2, *settings)
    buffers = load_file(run / "checkpoints/step-00000003/buffers.safetensors")
    assert {name.removeprefix("ema/") for name in buffers} == {"targets.mean", "targets.basis"}, "no frozen encoder's"
    undisturbed, last = runs.losses(run), run / "checkpoints/step-00000006"
    files = {file.name: file.read_bytes() for file in last.glob("*.safetensors")}
    shutil.rmtree(last)
    train(shards, tmp_path, 2, *settings)
    assert runs.losses(run) == undisturbed and [start["step"] for start in runs.events(run, "start")] == [0, 3]
    assert {file.name: file.read_bytes() for file in last.glob("*.safetensors")} == files


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("branch.targets=pca",), VAE, ENCODER], ids=["pca", "vae", "encoder"])
def test_a_run_is_scored_by_its_own_targets_and_only_there(
    shards: Path, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    run = train(shards, tmp_path, 1, *runs.TINY, "steps=1", *targets, "ema=null")
    decoder = load_decoder(run)
    images = torch.randint(0, 256, (2, 3, decoder.image_size, decoder.image_size), dtype=torch.uint8)
    assert decoder.mllm.targets is not None and float(decoder.mllm.targets.basis.square().sum()) > 0
    torch.testing.assert_close(decoder.encode(images), decoder.mllm.targets(images))
    decoded = decoder.latents(["a red car"], [0])
    assert decoded.shape == decoder.encode(images[:1]).shape and decoded.isfinite().all()

    words = ["generate", "--mllm", str(run), "--controlnet", str(tmp_path), "--out", str(tmp_path / "images"), "a car"]
    with pytest.raises(
        RunError, match=r"branch\.targets is (pca|vae|encoder), and a ControlNet takes the MLLM's own latents"
    ):
        CliRunner().invoke(app, words, catch_exceptions=False)
    with pytest.raises(RunError, match=r"branch\.targets is (pca|vae|encoder).*--format hf"):
        export(run, tmp_path / "public", "public")
    export(run, tmp_path / "hf", "hf", dtype=torch.float32)
    train(shards, tmp_path, 1, *runs.TINY, "steps=1", *targets, f"init_from={tmp_path / 'hf'}", "name=again")
    again = load_decoder(tmp_path / "again").mllm.targets
    assert again is not None and torch.equal(again.basis, decoder.mllm.targets.basis)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("backbone.vision_encoder=cached",), "backbone.vision_encoder is for the MLLM's own latents"),
        (("previews.every=5", "previews.controlnet=x"), "previews.every is for the MLLM's own latents"),
    ],
)
def test_settings_for_native_latents_are_refused(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("tiny-mllm", ["branch.targets=random", *settings])


def test_what_makes_no_targets_is_refused() -> None:
    from bifrost.trainer.planner import parts

    with pytest.raises(RunError, match="a patch has 2,352 values, fewer than"):
        parts(load_recipe("mllm-7b", ["branch.targets=pca"]))
    with pytest.raises(RecipeError, match=r"branch\.targets=vae needs flux\.path"):
        load_recipe("mllm-7b", ["branch.targets=vae"])
    for settings, message in (
        (["branch.targets=encoder"], r"branch\.targets=encoder needs branch\.encoder"),
        (["branch.encoder=builtin:tiny"], r"branch\.encoder has no effect"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe("mllm-7b", settings)
    with pytest.raises(RunError, match="60 x 60 VAE latents do not divide into 16 x 16 patches"):
        parts(load_recipe("mllm-7b", ["branch.targets=vae", "flux.path=black-forest-labs/FLUX.1-dev", SIZE_480]))
