"""Images in other shapes than squares, from the true latents of images and from prompts, by runs that were trained in
buckets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import plain_decoding
import ranked
import run_folders
import shaped_shards
import tiny_flux
from bifrost.data import open_dataset
from bifrost.data.transforms import decode_shapes
from bifrost.recipes import load_recipe
from bifrost.trainer.errors import RunError
from bifrost.trainer.evaluation.image_metrics import psnr
from bifrost.trainer.evaluation.reconstruction import evaluate_reconstruction
from bifrost.trainer.inference.flux_sampler import Text, draw_noise, sample
from bifrost.trainer.inference.generator import Generator
from bifrost.trainer.inference.settings import Sampling, Settings
from bifrost.trainer.models.flux import FluxFolder, FluxTokenizers, FrozenFlux, pack

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = Settings(flux=Sampling(2))
BUCKETS = "data.buckets={ratios: [1x1, 3x2, 2x3]}"
NOT_BOTH = "the two stages were not both trained in it (data.buckets)"


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory, flux: Path) -> Path:
    """A stage-2 run in three shapes."""
    recipe = load_recipe("tiny-controlnet", [f"flux.path={flux}", "ema=null", BUCKETS])
    return run_folders.save(tmp_path_factory.mktemp("bucketed") / "controlnet", recipe, 2)


@pytest.fixture(scope="module")
def wide_mllm(tmp_path_factory) -> Path:
    """A stage-1 run in the same shapes."""
    recipe = load_recipe("tiny-mllm", ["branch.positions=learned", "ema=null", BUCKETS])
    return run_folders.save(tmp_path_factory.mktemp("bucketed") / "mllm", recipe, 1)


@pytest.fixture(scope="module")
def both(wide_mllm: Path, bucketed: Path) -> Generator:
    return Generator.load(wide_mllm, bucketed)


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
    shape = generator.shape_of(wide.read_bytes())
    assert shape == "80x48"
    in_shape = replace(QUICK, shape=shape)
    (pixels, _) = decode_shapes(wide.read_bytes(), [(84, 140), (48, 80)])
    batch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
    latents = generator.encode_file(wide.read_bytes(), in_shape)
    assert torch.equal(latents, generator.encode(batch))
    assert latents.shape[1] == 3 * 5
    one, other = (
        generator.generate(["moon"], [0], in_shape, given)[0]
        for given in (latents, latents.unflatten(1, (3, 5)).flip(2).flatten(1, 2))
    )
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() > 2, "the place of a latent matters"


def test_prompts_give_squares(mllm: Path, bucketed: Path) -> None:
    (made,) = Generator.load(mllm, bucketed).generate(["moon"], [0], QUICK)
    assert made.size == (64, 64)


@pytest.mark.parametrize(("shape", "grid"), [("80x48", (3, 5)), ("48x80", (5, 3)), ("64x64", (4, 4))])
def test_prompts_give_any_shape_that_both_stages_know(
    both: Generator, shape: str, grid: tuple[int, int], tmp_path: Path, wide_mllm: Path, bucketed: Path
) -> None:
    settings = replace(QUICK, steps=6, shape=shape)
    both.check(settings)
    found = both.latents(["moon", "a red sun"], [4, 5], settings)
    for number, (prompt, seed) in enumerate([("moon", 4), ("a red sun", 5)]):
        torch.testing.assert_close(
            found[number], plain_decoding.latents(both, prompt, seed, 6, grid), atol=1e-4, rtol=1e-4
        )
    common = ["--mllm", str(wide_mllm), "--controlnet", str(bucketed), "--flux-steps", "2", "--steps", "6"]
    asked = ["--shape", shape, "--seed", "4", "--out", str(tmp_path / "out")]
    (ended,) = ranked.bifrost(1, "generate", "moon", *common, *asked)
    assert ended.code == 0, ended.err
    (made,) = (file for file in (tmp_path / "out").rglob("*.png") if "sheet" not in file.name)
    (wanted,) = both.generate(["moon"], [4], settings)
    assert f"{wanted.width}x{wanted.height}" == shape
    assert np.array_equal(np.asarray(Image.open(made)), np.asarray(wanted))
    (line,) = (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()
    assert json.loads(line)["settings"]["shape"] == shape


def test_a_shape_that_does_not_fit_is_one_line(
    mllm: Path, controlnet: Path, wide_mllm: Path, bucketed: Path, tmp_path: Path
) -> None:
    out = ("--out", str(tmp_path / "out"))
    for runs, shape, words in (
        ((wide_mllm, bucketed), "72x56", f"shape 72x56: {NOT_BOTH}; give shape 64x64 or 80x48 or 48x80"),
        ((wide_mllm, controlnet), "80x48", f"shape 80x48: {NOT_BOTH}; give shape 64x64"),
        ((mllm, bucketed), "72x56", f"shape 72x56: {NOT_BOTH}; give shape 64x64"),
        ((mllm, bucketed), "80x48", f"shape 80x48: {NOT_BOTH}; give shape 64x64"),
    ):
        given = ("--mllm", str(runs[0]), "--controlnet", str(runs[1]), "--shape", shape)
        (ended,) = ranked.bifrost(1, "generate", "moon", *given, *out)
        assert ended.code == 2
        assert ended.err.splitlines()[-1] == f"error: {words}"
    assert not (tmp_path / "out").exists()


def test_a_model_without_squares_needs_a_shape(both: Generator) -> None:
    assert both.rule is not None
    oblong = replace(both, shapes=((84, 140),))
    with pytest.raises(
        RunError, match=r"shape 64x64: the two stages were not both trained in it .*; give shape 80x48$"
    ):
        oblong.check(QUICK)
    oblong.check(replace(QUICK, shape="80x48", steps=15))
    with pytest.raises(RunError, match="16 decoding steps for 15 patches: set 1 to 15"):
        oblong.check(replace(QUICK, shape="80x48", steps=16))


def test_an_evaluation_in_a_shape(both: Generator, wide_mllm: Path, bucketed: Path, tmp_path: Path) -> None:
    """Of the images of one bucket; the error of predictions on whole masks against plain passes."""
    shards = shaped_shards.save(tmp_path / "shapes", 2)
    given = ["--mllm", str(wide_mllm), "--controlnet", str(bucketed), "--data", f"{shards}/train-*.tar"]
    few = ["--samples", "4", "--flux-steps", "2", "--steps", "4", "--shape", "80x48", "--out", str(tmp_path / "out")]
    (ended,) = ranked.bifrost(1, "eval", *given, *few)
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    data, errors = open_dataset(f"{shards}/train-*.tar"), []
    raws = {raw.key: raw for raw in (data.read(*data.place(number)) for number in range(len(data)) if number != 3)}
    assert len(found["data"]["train"]["keys"]) == 4
    for key in found["data"]["train"]["keys"]:
        assert int(key[-3:]) % 5 in (1, 3), "images of 96 x 64 and 100 x 66 pixels"
        (pixels,) = decode_shapes(raws[key].image, [(84, 140)])
        latents = both.encode(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None])
        errors.append(
            (plain_decoding.latents(both, raws[key].caption, 0, 1, (3, 5)) - latents[0]).square().mean().item()
        )
    assert found["figures"]["train"]["latents"]["1.0"]["mse"] == pytest.approx(np.mean(errors), rel=1e-4)


def test_reconstructions_are_in_the_shapes_of_the_images(bucketed: Path, controlnet: Path, tmp_path: Path) -> None:
    data = open_dataset(str(shaped_shards.save(tmp_path, 1)))
    generator = Generator.load_without_branch(bucketed)
    tall = evaluate_reconstruction(generator, data, samples=2, settings=replace(QUICK, shape="48x80"))
    assert {sample.original.shape[:2] for sample in tall.samples["train"]} == {(80, 48)}
    with pytest.raises(RunError, match="3 readable samples of shape 48x80 with distinct captions, 4 requested"):
        evaluate_reconstruction(generator, data, samples=4, settings=replace(QUICK, shape="48x80"))
    squares = Generator.load_without_branch(controlnet)
    with pytest.raises(RunError, match="shape 48x80: the ControlNet was trained in 64x64; give one of these"):
        evaluate_reconstruction(squares, data, samples=2, settings=replace(QUICK, shape="48x80"))
    found = evaluate_reconstruction(generator, data, samples=8, settings=QUICK)
    shapes = {sample.original.shape[:2] for sample in found.samples["train"]}
    assert shapes == {(64, 64), (48, 80), (80, 48)}
    values = []
    for one, seed in zip(found.samples["train"], found.image_seeds["train"], strict=True):
        latents = generator.encode(torch.from_numpy(one.seen.transpose(2, 0, 1).copy())[None])
        (made,) = generator.generate([one.caption], [seed], replace(QUICK, shape=str(one.bucket)), latents)
        pair = (torch.from_numpy(np.array(image).transpose(2, 0, 1))[None] for image in (made, one.original))
        values.append(float(psnr(*pair)))
    assert found.figures["train"]["reconstruction"]["psnr"] == pytest.approx(np.mean(values), abs=0.02)
