"""Predicted latents of images in aspect-ratio buckets: decoded in the shape of each image, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import plain_decoding
import run_folders
import runs
import shaped_shards
import tiny_flux
from bifrost.data import open_dataset
from bifrost.recipes import Recipe, load_recipe
from bifrost.trainer.errors import RunError
from bifrost.trainer.inference.latent_decoder import load_decoder
from bifrost.trainer.inference.predicted_latents import order_seed
from bifrost.trainer.planner import caches
from bifrost.trainer.stages import precompute
from bifrost.trainer.training.run_context import open_run_stage

pytestmark = pytest.mark.usefixtures("one_thread")
BUCKETS = "data.buckets={ratios: [1x1, 3x2, 2x3]}"
GRIDS = [(4, 4), (3, 5), (5, 3), (3, 5), (4, 4)]
"""Of the images of shaped_shards, in turn."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with shards, a FLUX, and a run of stage 1 in three shapes."""
    place = tmp_path_factory.mktemp("predicted")
    shaped_shards.save(place / "shapes", 1)
    tiny_flux.save(tiny_flux.pipeline(), place / "flux")
    run_folders.save(place / "mllm", load_recipe("tiny-mllm", ["branch.positions=learned", "ema=null", BUCKETS]), 1)
    return place


def recipe(place: Path, *settings: str) -> Recipe:
    own = (f"flux.path={place}/flux", f"controlnet.mllm={place}/mllm", "controlnet.latents=predicted", "micro_batch=4")
    whole = (*runs.TINY, *own, "controlnet.decode_steps=6", BUCKETS, *settings)
    return load_recipe("tiny-controlnet", runs.arguments(place / "shapes", place, *whole, recipe="tiny-controlnet")[2:])


@pytest.fixture(scope="module")
def encoded(place: Path) -> Recipe:
    made = recipe(place)
    precompute.encode(open_run_stage(made).outputs(), made.data, None, made.micro_batch)
    return made


def test_they_are_those_of_a_plain_loop_in_the_shape_of_the_image(place: Path, encoded: Recipe) -> None:
    cache = open_run_stage(encoded).open_caches()["predicted"]
    data, decoder = open_dataset(f"{place}/shapes/train-*.tar"), load_decoder(place / "mllm", dtype=torch.float32)
    for number in (0, 1, 2, 4, 6, 7):
        raw = data.read_any(0, number)
        found = cache.read((0, number), raw.key)["latents"]
        wanted = plain_decoding.latents(decoder, raw.caption, order_seed(0, raw.key), 6, GRIDS[number % 5])
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert caches(encoded) == {"predicted": cache.read((0, 0), data.entry(0, 0)[0])["latents"].nbytes}, "the largest"


def test_an_image_in_no_bucket_has_none(place: Path, tmp_path: Path, capsys) -> None:
    made = recipe(place, f"data.shards={shaped_shards.save(tmp_path, 1)}")
    precompute.encode(open_run_stage(made).outputs(), made.data, None, made.micro_batch)
    assert "13 samples in 1 shard, 1 unreadable or in no bucket" in capsys.readouterr().out


def test_other_buckets_are_another_cache(place: Path, encoded: Recipe) -> None:
    for other in ("data.buckets.max_upscale=3", "data.buckets.ratios=[1x1, 3x2]", "data.buckets=null"):
        with pytest.raises(RunError, match=r"controlnet.latents=predicted: .*; run `bifrost data encode`"):
            open_run_stage(recipe(place, other)).open_caches()


def test_what_stage_1_was_not_trained_in_is_one_line(place: Path, tmp_path: Path) -> None:
    squares = run_folders.save(tmp_path / "squares", load_recipe("tiny-mllm", ["ema=null"]), 2)
    oblong = load_recipe("tiny-mllm", ["ema=null", "data.buckets={ratios: [3x2, 2x3]}"])
    oblong = run_folders.save(tmp_path / "oblong", oblong, 3)
    for settings, message in (
        ((f"controlnet.mllm={squares}",), f"controlnet.mllm={squares}: was not trained in 80x48, 48x80; give both"),
        ((f"controlnet.mllm={oblong}",), f"controlnet.mllm={oblong}: was not trained in 64x64; give both stages the"),
        ((f"controlnet.mllm={oblong}", "data.buckets=null"), f"mllm={oblong}: was not trained in 112x112; give both"),
        (("controlnet.decode_steps=16",), "controlnet.decode_steps: 16 decoding steps for 15 patches: set 1 to 15"),
    ):
        with pytest.raises(RunError) as caught:
            open_run_stage(recipe(place, *settings))
        assert message in str(caught.value) and "\n" not in str(caught.value)
