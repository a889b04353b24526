"""Runs of stage 2 on predicted latents: the same on any number of ranks, resumed to the bit, replayed, end to end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import plain
import ranked
import runs
import tiny_flux
from bifrost.recipes import load_recipe

pytestmark = [pytest.mark.multi, pytest.mark.slow]

KINDS = {"predicted": ("controlnet.latents=predicted",), "mix": ("controlnet.latents=mix",)}


@pytest.fixture(scope="module")
def place(tmp_path_factory, shards: Path) -> Path:
    """A folder with shards, a FLUX, a short run of stage 1, and its predictions from two ranks."""
    place = tmp_path_factory.mktemp("predicted")
    shutil.copytree(shards, place / "data")
    tiny_flux.save(tiny_flux.pipeline(), place / "flux")
    stage_1 = runs.arguments(place / "data", place, *runs.TINY, "steps=3", "checkpoint.every=2", "micro_batch=4")
    ended = ranked.bifrost(2, *stage_1, "ema.decay=0.9", "name=mllm")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    ended = ranked.bifrost(2, "data", "encode", *arguments(place, place, 2, *KINDS["mix"])[1:])
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    return place


def arguments(place: Path, runs_dir: Path, ranks: int, *settings: str) -> list[str]:
    whole = (*runs.TINY, f"flux.path={place}/flux", f"micro_batch={8 // ranks}", "optimizer.lr=3e-3")
    whole += (f"controlnet.mllm={place}/mllm", *settings)
    return runs.arguments(place / "data", runs_dir, *whole, recipe="tiny-controlnet")


def train(place: Path, runs_dir: Path, ranks: int, *settings: str) -> Path:
    ended = ranked.bifrost(ranks, *arguments(place, runs_dir, ranks, *settings))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return runs_dir / "tiny-controlnet"


def cached(place: Path) -> dict[str, bytes]:
    (folder,) = place.glob("data/cache-predicted-*")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_equal_plain_pytorch(place: Path, tmp_path: Path, kind: str) -> None:
    """With a vision encoder that is sharded in `mix`: each rank runs it, whatever its samples drew."""
    settings = (*KINDS[kind], "steps=4", "flux.placement.vision_encoder=sharded", "flux.caption_exchange=0.5")
    wanted = plain.losses(load_recipe("tiny-controlnet", arguments(place, tmp_path, 1, *settings)[2:]))
    for ranks in (1, 2, 4):
        run = train(place, tmp_path / str(ranks), ranks, *settings)
        np.testing.assert_allclose(runs.losses(run), wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_to_the_bit_and_replay_shows_the_draws(
    place: Path, tmp_path: Path, kind: str
) -> None:
    settings = (*KINDS[kind], "steps=6", "checkpoint.every=3", "ema.decay=0.9", "data.workers=1")
    settings += (f"data.shards={place}/data/train-0000[0-2].tar",)
    settings += (f"validation.shards={place}/data/train-00003.tar", "validation.every=3", "validation.samples=8")
    run = train(place, tmp_path, 2, *settings)
    undisturbed = runs.losses(run)
    held_out = [line["val_loss"] for line in runs.lines(run) if "val_loss" in line]
    assert len(held_out) == 2 and all(np.isfinite(held_out))
    last = run / "checkpoints/step-00000006"
    before = {file.name: file.read_bytes() for file in last.glob("*.safetensors")}
    shutil.rmtree(last)
    train(place, tmp_path, 2, *settings)
    assert runs.losses(run) == undisturbed
    assert {file.name: file.read_bytes() for file in last.glob("*.safetensors")} == before

    (ended,) = ranked.bifrost(1, "replay", str(run), "--json", "--step=4")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["loss"] == pytest.approx(undisturbed[3], abs=1e-5)
    assert {sample["latents_predicted"] for sample in found["samples"]} == {
        "predicted": {True},
        "mix": {True, False},
    }[kind]


def test_encoding_is_the_same_on_one_rank_and_another_checkpoint_is_refused(place: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(place, tmp_path / "other", ignore=shutil.ignore_patterns("cache-*")))
    settings = (*KINDS["predicted"], "steps=1", "micro_batch=4")
    (ended,) = ranked.bifrost(1, "data", "encode", *arguments(other, tmp_path, 1, *settings)[1:])
    assert ended.code == 0 and "60 samples in 4 shards" in ended.out, ended.err
    assert cached(other) == cached(place)
    train(other, tmp_path, 1, *settings)

    stage_1 = runs.arguments(other / "data", other, *runs.TINY, "steps=5", "checkpoint.every=2", "micro_batch=4")
    ended = ranked.bifrost(2, *stage_1, "ema.decay=0.9", "name=mllm")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err

    def refused(*more: str) -> str:
        (ended,) = ranked.bifrost(1, *arguments(other, tmp_path, 1, *settings, *more))
        assert ended.code == 2, ended.err
        (line,) = ended.err.strip().splitlines()
        return line

    line = refused("name=second")
    assert line.startswith("error: controlnet.latents=predicted: ") and "made with another stage-1 weights" in line
    assert not (tmp_path / "second").exists()
    line = refused("steps=2")
    assert "was trained on other frozen weights than" in line and f"controlnet.mllm={other}/mllm" in line
    assert 'controlnet.latents was "predicted" in this run' in refused("steps=2", "controlnet.latents=true")
    earlier = f"controlnet.mllm={other}/mllm/checkpoints/step-00000003"
    train(other, tmp_path, 1, *settings, "steps=2", earlier)
