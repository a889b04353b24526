"""Stage 2 on predicted latents in aspect-ratio buckets: the same on any number of ranks, resumed to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import opened
import plain
import ranked
import runs
import shaped_shards
import tiny_flux
from bifrost.recipes import load_recipe

pytestmark = [pytest.mark.multi, pytest.mark.slow]

BUCKETS = "data.buckets={ratios: [1x1, 3x2, 2x3]}"
SHARDED = "flux.placement.vision_encoder=sharded"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with shards, a FLUX, a short run of stage 1 in three shapes, and its predictions from two ranks."""
    place = tmp_path_factory.mktemp("predicted")
    shaped_shards.save(place / "data")
    tiny_flux.save(tiny_flux.pipeline(), place / "flux")
    own = ("steps=3", "micro_batch=4", "data.max_bad_fraction=1", BUCKETS, "name=mllm", "optimizer.lr=3e-3")
    stage_1 = runs.arguments(place / "data", place, *runs.TINY, *own)
    for command in (stage_1, ["data", "encode", *arguments(place, place, 2)[1:]]):
        ended = ranked.bifrost(2, *command)
        assert [rank.code for rank in ended] == [0, 0], ended[0].err
    return place


def arguments(place: Path, runs_dir: Path, ranks: int, *settings: str) -> list[str]:
    own = (f"flux.path={place}/flux", f"micro_batch={8 // ranks}", "optimizer.lr=3e-3", "data.max_bad_fraction=1")
    own += (f"controlnet.mllm={place}/mllm", "controlnet.latents=mix", "controlnet.decode_steps=8", BUCKETS)
    return runs.arguments(place / "data", runs_dir, *runs.TINY, *own, *settings, recipe="tiny-controlnet")


def train(place: Path, runs_dir: Path, ranks: int, *settings: str) -> Path:
    ended = ranked.bifrost(ranks, *arguments(place, runs_dir, ranks, *settings))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return runs_dir / "tiny-controlnet"


@pytest.mark.parametrize(
    ("settings", "every"), [((SHARDED,), (1, 2, 4)), (("controlnet.latents=predicted",), (2,))], ids=["mix", "all"]
)
def test_ranks_and_resumes_equal_plain_pytorch(
    place: Path, tmp_path: Path, settings: tuple[str, ...], every: tuple[int, ...]
) -> None:
    """With a vision encoder that is sharded in `mix`: each rank runs it, whatever its samples drew."""
    settings = ("steps=6", *settings)
    recipe = load_recipe("tiny-controlnet", arguments(place, tmp_path, 1, *settings)[2:])
    plan = opened.inputs(recipe).plan
    assert sorted({plan.bucket(batch) for batch in range(6)}) == [0, 1, 2], "all shapes are trained on"
    wanted = plain.losses(recipe)
    for ranks in every:
        run = train(place, tmp_path / str(ranks), ranks, *settings)
        np.testing.assert_allclose(runs.losses(run), wanted, rtol=1e-5)
    for ranks, steps in ((2, 2), (1, 4), (4, 6)):
        run = train(place, tmp_path / "parts", ranks, *settings, f"steps={steps}")
    np.testing.assert_allclose(runs.losses(run), wanted, rtol=1e-5)
    true = plain.losses(
        load_recipe("tiny-controlnet", [*arguments(place, tmp_path, 1, *settings)[2:], "controlnet.latents=true"])
    )
    assert abs(true[-1] / wanted[-1] - 1) > 1e-4, "the predictions matter"


def test_a_resumed_run_is_the_same_to_the_bit_and_replay_shows_the_draws(place: Path, tmp_path: Path) -> None:
    settings = ("steps=6", "checkpoint.every=3", "ema.decay=0.9")
    run = train(place, tmp_path, 2, *settings)
    undisturbed, last = runs.losses(run), run / "checkpoints/step-00000006"
    before = {file.name: file.read_bytes() for file in last.glob("*.safetensors")}
    shutil.rmtree(last)
    train(place, tmp_path, 2, *settings)
    assert runs.losses(run) == undisturbed
    assert {file.name: file.read_bytes() for file in last.glob("*.safetensors")} == before
    found = runs.replay(run, "--step=4")
    assert found["loss"] == pytest.approx(undisturbed[3], abs=1e-5)
    assert {sample["latents_predicted"] for sample in found["samples"]} == {True, False}
