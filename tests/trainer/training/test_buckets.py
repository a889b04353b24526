"""Stage 2 in aspect-ratio buckets trains as plain PyTorch on any number of ranks, and through a resume on others."""

from __future__ import annotations

import json
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
from bifrost.trainer.errors import RunError
from bifrost.trainer.training.setting_changes import FIXED, check_unchanged

pytestmark = [pytest.mark.multi, pytest.mark.slow]

BUCKETS = "data.buckets={ratios: [1x1, 3x2, 2x3]}"
SHAPES = ["64x64", "80x48", "48x80"]


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return tiny_flux.save(tiny_flux.pipeline(), tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return shaped_shards.save(tmp_path_factory.mktemp("shapes"))


def arguments(shards: Path, flux: Path, runs_dir: Path, ranks: int, *settings: str) -> list[str]:
    own = (f"flux.path={flux}", f"micro_batch={8 // ranks}", "optimizer.lr=3e-3", "data.max_bad_fraction=1")
    return runs.arguments(shards, runs_dir, *runs.TINY, *own, BUCKETS, *settings, recipe="tiny-controlnet")


def train(shards: Path, flux: Path, runs_dir: Path, ranks: int, *settings: str) -> Path:
    ended = ranked.bifrost(ranks, *arguments(shards, flux, runs_dir, ranks, *settings))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return runs_dir / "tiny-controlnet"


@pytest.mark.parametrize(
    "settings",
    [
        ("controlnet.norm=batch", "activation_checkpointing=false", "flux.draws=2", "data.workers=1"),
        ("controlnet.norm=group", "activation_checkpointing=true", "flux.placement.vae=offloaded"),
    ],
    ids=["batch-draws", "group-recomputed"],
)
def test_ranks_and_resumes_equal_plain_pytorch(shapes: Path, flux: Path, tmp_path: Path, settings) -> None:
    settings = ("steps=6", *settings)
    recipe = load_recipe("tiny-controlnet", arguments(shapes, flux, tmp_path, 1, *settings)[2:])
    plan = opened.inputs(recipe).plan
    assert sorted({plan.bucket(batch) for batch in range(6)}) == [0, 1, 2], "all shapes are trained on"
    wanted = plain.losses(recipe)
    digests = set()
    for ranks in (1, 2, 4):
        run = train(shapes, flux, tmp_path / str(ranks), ranks, *settings)
        np.testing.assert_allclose(runs.losses(run), wanted, rtol=1e-5)
        digests.add(tuple(line["data_digest"] for line in runs.steps(run)))
    for ranks, steps in ((2, 2), (1, 3), (4, 5), (2, 6)):
        run = train(shapes, flux, tmp_path / "parts", ranks, *settings, f"steps={steps}")
    np.testing.assert_allclose(runs.losses(run), wanted, rtol=1e-5)
    digests.add(tuple(line["data_digest"] for line in runs.steps(run)))
    assert len(digests) == 1, "another sequence of samples on another number of ranks"


def test_a_run_records_replays_and_validates(shapes: Path, flux: Path, tmp_path: Path) -> None:
    """What one run in buckets leaves: left out samples in one line, held-out losses, and steps that can be replayed."""
    held_out = shaped_shards.save(tmp_path / "held-out", 2, first=100)
    validation = (f"validation.shards={held_out}", "validation.every=2")
    settings = ("steps=4", "checkpoint.every=2", *validation)
    recipe = load_recipe("tiny-controlnet", arguments(shapes, flux, tmp_path, 2, *settings)[2:])
    inputs = opened.inputs(recipe)
    (ended, *_) = ranked.bifrost(2, *arguments(shapes, flux, tmp_path, 2, *settings))
    assert ended.code == 0, ended.err
    word = "data.buckets: 1 of 52 samples left out: 1 would be enlarged more than data.buckets.max_upscale, 0 without"
    assert (ended.out + ended.err).count(word) == 1
    run = tmp_path / "tiny-controlnet"
    for step in (2, 4):
        found = runs.replay(run, f"--step={step}")
        located = inputs.plan.locate(np.arange(8 * step - 8, 8 * step))
        assert [(s["epoch"], s["index"]) for s in found["samples"]] == list(
            zip(located.epoch.tolist(), located.index.tolist(), strict=True)
        )
        assert {sample["bucket"] for sample in found["samples"]} == {SHAPES[inputs.plan.bucket(step - 1)]}
        assert found["data_digest"] == found["logged_data_digest"]
    assert found["weights_step"] == 2
    one = train(shapes, flux, tmp_path / "one", 1, *settings)
    values, alone = ([line["val_loss"] for line in runs.lines(each) if line.get("val_loss")] for each in (run, one))
    assert len(values) == 2
    np.testing.assert_allclose(values, alone, rtol=1e-5)


def test_a_mixture_keeps_its_shares_and_continues_with_others(shapes: Path, flux: Path, tmp_path: Path) -> None:
    other = shaped_shards.save(tmp_path / "other", 1, first=200)
    sources = "data.sources=[{name: a, shards: %s, weight: 3}, {name: b, shards: %s, weight: 1}]"
    first = ("data.shards=null", sources % (shapes, other))
    second = ("data.shards=null", f"data.sources=[{{name: b, shards: {other}}}]")
    whole = train(shapes, flux, tmp_path / "whole", 2, "steps=4", *first)
    train(shapes, flux, tmp_path / "whole", 1, "steps=6", *second)
    train(shapes, flux, tmp_path / "parts", 1, "steps=4", *first)
    parts = train(shapes, flux, tmp_path / "parts", 2, "steps=6", *second)
    np.testing.assert_allclose(runs.losses(parts), runs.losses(whole), rtol=1e-5)
    assert [line["data_digest"] for line in runs.steps(parts)] == [line["data_digest"] for line in runs.steps(whole)]
    last = runs.steps(whole)[3]
    assert last["source_samples_a"] + last["source_samples_b"] == 32
    assert abs(last["source_samples_b"] - 8) <= 2
    assert runs.steps(whole)[5]["source_samples_b"] == last["source_samples_b"] + 16
    stored = json.loads((whole / "mixture.json").read_text())["segments"]
    assert [sum(source["buckets"]) for source in stored[0]["sources"]] == [51, 12]
    found = runs.replay(whole, "--step=2")
    assert {sample["source"] for sample in found["samples"]} == {"a", "b"}


def test_a_run_keeps_its_buckets(shapes: Path, flux: Path, tmp_path: Path) -> None:
    before, now = (
        load_recipe("tiny-controlnet", arguments(shapes, flux, tmp_path, 1, *more)[2:]).model_dump(mode="json")
        for more in ((), ("data.buckets.max_upscale=1.5",))
    )
    with pytest.raises(RunError, match=r"data.buckets.max_upscale was 2.0 in this run and is 1.5 now"):
        check_unchanged(now, before, FIXED, tmp_path)
