"""Images in other shapes than squares, from the true latents of images, by a ControlNet that was trained in buckets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ranked
import run_folders
import shaped_shards
import tiny_flux
from bifrost.data import open_dataset
from bifrost.data.transforms import decode_shapes
from bifrost.recipes import load_recipe
from bifrost.trainer.evaluation.image_metrics import psnr
from bifrost.trainer.evaluation.reconstruction import evaluate_reconstruction
from bifrost.trainer.inference.flux_sampler import Text, draw_noise, sample
from bifrost.trainer.inference.generator import Generator
from bifrost.trainer.inference.settings import Sampling, Settings
from bifrost.trainer.models.flux import FluxFolder, FluxTokenizers, FrozenFlux, pack

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = Settings(flux=Sampling(2))


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory, flux: Path) -> Path:
    """A stage-2 run in three shapes."""
    settings = [f"flux.path={flux}", "ema=null", "data.buckets={ratios: [1x1, 3x2, 2x3]}"]
    recipe = load_recipe("tiny-controlnet", settings)
    return run_folders.save(tmp_path_factory.mktemp("bucketed") / "controlnet", recipe, 2)


def test_a_rectangle_is_that_of_diffusers_pipeline(tmp_path: Path) -> None:
    pipeline = tiny_flux.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    flux = FrozenFlux(FluxFolder.open(tiny_flux.save(pipeline, tmp_path)))
    flux.load()
    noise = draw_noise([3], 6 * 10, 16)
    wanted = pipeline(
        "moon",
        height=24,  # of the pipeline, whose latents are two pixels wide
        width=40,
        num_inference_steps=4,
        latents=noise,
        max_sequence_length=13,
        output_type="latent",
    ).images
    text = Text(*flux.encode_text(FluxTokenizers(flux.folder)(["moon"])))
    found = sample(flux, text, noise.unflatten(1, (6, 10)), Sampling(4))
    assert found.shape == (1, 4, 12, 20)
    torch.testing.assert_close(pack(found), wanted, atol=1e-4, rtol=0)


def test_an_images_own_latents_give_its_shape(mllm: Path, bucketed: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    wide.write_bytes(shaped_shards.drawing(3, (30, 20)))  # smaller than training would use
    common = ["--mllm", str(mllm), "--controlnet", str(bucketed), "--flux-steps", "2", "--latents-from", str(wide)]
    (ended,) = ranked.bifrost(1, "generate", "moon", *common, "--out", str(tmp_path / "out"))
    assert ended.code == 0, ended.err
    (made,) = (file for file in (tmp_path / "out").rglob("*.png") if "sheet" not in file.name)
    assert Image.open(made).size == (80, 48)
    generator = Generator.load(mllm, bucketed)
    bucket = generator.bucket_of(wide.read_bytes())
    assert str(bucket) == "80x48"
    (pixels, _) = decode_shapes(wide.read_bytes(), [(84, 140), (48, 80)])
    batch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
    latents = generator.encode_file(wide.read_bytes(), bucket)
    assert torch.equal(latents, generator.encode(batch))
    assert latents.shape[1] == 3 * 5
    one, other = (
        generator.generate(["moon"], [0], QUICK, given, bucket=bucket)[0]
        for given in (latents, latents.unflatten(1, (3, 5)).flip(2).flatten(1, 2))
    )
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() > 2, "the place of a latent matters"


def test_prompts_give_squares(mllm: Path, bucketed: Path) -> None:
    (made,) = Generator.load(mllm, bucketed).generate(["moon"], [0], QUICK)
    assert made.size == (64, 64)


def test_reconstructions_are_in_the_shapes_of_the_images(bucketed: Path, tmp_path: Path) -> None:
    data = open_dataset(str(shaped_shards.save(tmp_path, 1)))
    generator = Generator.load_without_branch(bucketed)
    found = evaluate_reconstruction(generator, data, samples=8, settings=QUICK)
    shapes = {sample.original.shape[:2] for sample in found.samples["train"]}
    assert shapes == {(64, 64), (48, 80), (80, 48)}
    values = []
    for one, seed in zip(found.samples["train"], found.image_seeds["train"], strict=True):
        latents = generator.encode(torch.from_numpy(one.seen.transpose(2, 0, 1).copy())[None])
        (made,) = generator.generate([one.caption], [seed], QUICK, latents, bucket=one.bucket)
        pair = (torch.from_numpy(np.array(image).transpose(2, 0, 1))[None] for image in (made, one.original))
        values.append(float(psnr(*pair)))
    assert found.figures["train"]["reconstruction"]["psnr"] == pytest.approx(np.mean(values), abs=0.02)
