"""Patch latents of a cache are those of the vision encoder, which is then not loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import opened
import plain
import runs
import small_model
from bifrost.data import ReadableSamples
from bifrost.recipes import Recipe, load_recipe
from bifrost.recipes.load import RecipeError
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.backbone import FrozenBackbone
from bifrost.trainer.planner import parts, plan, workload
from bifrost.trainer.stages import open_stage, precompute
from bifrost.trainer.stages.unsharded import init_context

CACHED = "backbone.vision_encoder=cached"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "data"))


def recipe(data: Path, *more: str) -> Recipe:
    name, *overrides = runs.arguments(data, data.parent / "runs", *more)[1:]
    return load_recipe(name, overrides)


def encode(recipe: Recipe) -> None:
    precompute.encode(open_stage(recipe).outputs(), recipe.data, recipe.validation.shards, recipe.micro_batch)


def refusal(recipe: Recipe) -> str:
    with pytest.raises(RunError) as error:
        open_stage(recipe).open_caches()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_latents_are_the_encoders_to_the_bit(data: Path, precision: str) -> None:
    cached = recipe(data, f"precision={precision}", "micro_batch=4", CACHED, *runs.TINY)
    encode(cached)
    stage = open_stage(cached)
    cache = stage.open_caches()["vision"]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    with init_context(torch.device("cpu"), dtype):
        backbone = FrozenBackbone(stage.config)
    backbone.restore_rotary()
    backbone.load(stage.files)
    inputs = opened.inputs(recipe(data, f"precision={precision}", *runs.TINY))
    collate, samples = inputs.stage.collate(inputs.dataset), ReadableSamples(inputs.dataset, inputs.stage.image_sizes)
    for shard, numbers in ((0, [3, 9, 0, 14]), (1, [14, 13, 12, 11])):  # whole micro-batches, as in training
        items = [samples.read(0, shard, number, 0, []) for number in numbers]
        wanted = backbone.patch_latents(collate(items)["images"])
        assert wanted.dtype == dtype and wanted.shape[1] == 16
        found = torch.stack([cache.read(item.origin, item.key)["latents"] for item in items])
        assert torch.equal(found, wanted)


def test_losses_are_those_without_a_cache_and_the_encoder_is_not_loaded(data: Path) -> None:
    settings = ("micro_batch=8", "steps=3", "branch.draws=2", f"validation.shards={data}/train-00003.tar")
    settings += (f"data.shards={data}/train-0000[0-2].tar",)
    cached = recipe(data, *settings, CACHED)
    encode(cached)
    assert plain.losses(cached) == plain.losses(recipe(data, *settings))

    stage = open_stage(cached)
    with torch.device("meta"):
        model = stage.build()
    assert not any(name.startswith("backbone.vision") for name, _ in model.named_parameters())
    assert stage.frozen()[0][1] == open_stage(recipe(data, *settings)).frozen()[0][1], "a run may resume without"
    names = {
        type(collate).__name__ for collate in stage.validation_collates(f"{data}/train-00003.tar", NoRanks).values()
    }
    assert names == {"PatchLatentCollate"}
    before, after = (plan(parts(one), workload(one), 2) for one in (recipe(data, *settings), cached))
    assert after.memory.held["frozen weights"] < before.memory.held["frozen weights"]
    (encoder,) = [part for part in parts(cached) if part.name == "vision encoder"]
    assert encoder.place == "cached"


def test_a_cache_of_several_sources_is_read_in_their_order(data: Path) -> None:
    sources = [
        {"name": "later", "shards": f"{data}/train-0000[23].tar", "weight": 1},
        {"name": "earlier", "shards": f"{data}/train-00000.tar", "weight": 2},
    ]
    settings = ("micro_batch=8", "steps=3", "data.shards=null", f"data.sources={json.dumps(sources)}")
    cached = recipe(data, *settings, CACHED)
    encode(cached)
    assert plain.losses(cached) == plain.losses(recipe(data, *settings))


class NoRanks:
    rank, size = 0, 1
    gather = staticmethod(lambda value: [value])
    broadcast = staticmethod(lambda value: value)


def test_another_backbone_size_precision_or_shard_is_refused(data: Path, tmp_path: Path) -> None:
    assert refusal(recipe(data, CACHED)).startswith("backbone.vision_encoder=cached:")
    encode(recipe(data, CACHED))
    assert open_stage(recipe(data, CACHED)).open_caches()
    assert "data.image_size 56, here 112" in refusal(recipe(data, CACHED, "data.image_size=112"))
    assert "precision fp32, here bf16" in refusal(recipe(data, CACHED, "precision=bf16"))

    other = Path(shutil.copytree(small_model.shared(), tmp_path / "other"))
    text, vision = (Path(shutil.copytree(other, tmp_path / name)) for name in ("text", "vision"))
    for folder, word in ((text, "embed_tokens"), (vision, "visual.blocks.0.norm1")):
        weights = load_file(folder / "model.safetensors")
        (name,) = [name for name in weights if word in name]
        save_file({**weights, name: weights[name] + 1}, folder / "model.safetensors", {"format": "pt"})
    of = "backbone.path={}", "data.image_size=56"
    assert open_stage(recipe(data, CACHED, of[0].format(text), of[1])).open_caches(), "another text model"
    assert "another vision encoder weights" in refusal(recipe(data, CACHED, of[0].format(vision), of[1]))
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["window_size"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    assert "another vision config" in refusal(recipe(data, CACHED, of[0].format(other), of[1]))

    for name in ("train-00000.tar", "train-00000.index.jsonl"):  # the samples of another shard
        shutil.copy(data / name.replace("0.", "1."), data / name)
    assert "made from another train-00000.tar (1 of 4" in refusal(recipe(data, CACHED))
    with pytest.raises(
        RecipeError, match=r"backbone\.vision_encoder is for stage 1; .* flux\.placement\.vision_encoder"
    ):
        load_recipe("tiny-controlnet", [CACHED])


def test_the_size_is_printed_first_and_a_full_disk_refused(
    data: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = recipe(data, CACHED)
    free = 60 * (4 * 32 * 4 + precompute.TAR_BYTES)
    monkeypatch.setattr(precompute.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(free, 1, free - 1))
    with pytest.raises(RunError, match=rf"{data}: the cache needs 270 KiB, 270 KiB are free; free space"):
        encode(small)
    assert not list(data.glob("cache-*"))
    assert capsys.readouterr().out == "vision: 60 samples to encode, 512 B each, 30 KiB in all\n"
    monkeypatch.setattr(precompute.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(free, 0, free))
    encode(small)
    encode(small)
    assert "vision: 0 samples to encode" in capsys.readouterr().out
    tars = list(data.glob("cache-vision-*/*.tar"))
    assert len(tars) == 4 and sum(tar.stat().st_size for tar in tars) < free
