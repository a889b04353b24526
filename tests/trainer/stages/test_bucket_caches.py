"""Caches of images in aspect-ratio buckets give the losses of training without them, to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import opened
import plain
import runs
import shaped_shards
import tiny_flux
from bifrost.data import open_dataset
from bifrost.recipes import Recipe, load_recipe
from bifrost.trainer.errors import RunError
from bifrost.trainer.planner import caches
from bifrost.trainer.stages import open_stage, precompute

pytestmark = pytest.mark.usefixtures("one_thread")
BUCKETS = "data.buckets={ratios: [1x1, 3x2, 2x3]}"
STAGE_1 = ("backbone.vision_encoder=cached",)
STAGE_2 = ("flux.placement.vae=cached", "flux.placement.vision_encoder=cached")


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return tiny_flux.save(tiny_flux.pipeline(), tmp_path_factory.mktemp("flux"))


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    return shaped_shards.save(tmp_path / "shapes", 3)


def recipe(stage: str, shapes: Path, flux: Path, *settings: str) -> Recipe:
    own = [f"flux.path={flux}"] if stage == "tiny-controlnet" else []
    own += ["micro_batch=8", "steps=6", "data.max_bad_fraction=1", BUCKETS]
    return load_recipe(stage, runs.arguments(shapes, shapes, *runs.TINY, *own, *settings, recipe=stage)[2:])


def encode(recipe: Recipe) -> None:
    precompute.encode(open_stage(recipe).outputs(), recipe.data, None, recipe.micro_batch)


@pytest.mark.parametrize(("stage", "cached"), [("tiny-mllm", STAGE_1), ("tiny-controlnet", STAGE_2)])
def test_losses_are_those_without_a_cache(
    stage: str, cached: tuple[str, ...], shapes: Path, flux: Path, capsys
) -> None:
    own = ("branch.positions=learned",) if stage == "tiny-mllm" else ("controlnet.norm=batch",)
    wanted, found = recipe(stage, shapes, flux, *own), recipe(stage, shapes, flux, *own, *cached)
    encode(found)
    assert capsys.readouterr().out.count(", 2 unreadable or in no bucket") == len(cached)
    assert len({opened.inputs(found).plan.bucket(step) for step in range(6)}) == 3, "all shapes are trained on"
    assert plain.losses(found) == plain.losses(wanted)


def test_a_cache_has_the_shape_of_every_image(shapes: Path, flux: Path) -> None:
    made = recipe("tiny-controlnet", shapes, flux, *STAGE_2)
    encode(made)
    cache, data = open_stage(made).open_caches(), open_dataset(f"{shapes}/train-*.tar")
    for number, grid in ((0, (4, 4)), (1, (3, 5)), (2, (5, 3)), (4, (4, 4))):
        key, _ = data.entry(0, number)
        assert cache["vision"].read((0, number), key)["latents"].shape == (np.prod(grid), 192)
        assert cache["vae"].read((0, number), key)["mean"].shape[-2:] == torch.Size(4 * side for side in grid)
    largest = [cache[kind].read((0, 0), data.entry(0, 0)[0]) for kind in ("vae", "vision")]
    sizes = [sum(tensor.nbytes for tensor in each.values()) for each in largest]
    assert [caches(made)[kind] for kind in ("vae", "vision")] == sizes


def test_other_buckets_are_refused(shapes: Path, flux: Path) -> None:
    encode(recipe("tiny-mllm", shapes, flux, *STAGE_1))
    for other in ("data.buckets.max_upscale=3", "data.buckets.ratios=[1x1, 3x2]", "data.buckets=null"):
        with pytest.raises(RunError, match=r"backbone.vision_encoder=cached: .*; run `bifrost data encode`"):
            open_stage(recipe("tiny-mllm", shapes, flux, *STAGE_1, other)).open_caches()
