"""Stage 1 in aspect-ratio buckets trains as plain PyTorch on any number of ranks, and through a resume on others."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import opened
import plain
import ranked
import runs
import shaped_shards
from bifrost.data import open_dataset
from bifrost.data.transforms import decode_shapes
from bifrost.kernels import PrefixLayout
from bifrost.recipes import load_recipe
from bifrost.trainer.models.masking import draw_masks, hidden_counts

pytestmark = pytest.mark.multi

BUCKETS = "data.buckets={ratios: [1x1, 3x2, 2x3]}"
GRIDS = [(4, 4), (3, 5), (5, 3)]
SHAPES = ["112x112", "140x84", "84x140"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return shaped_shards.save(tmp_path_factory.mktemp("shapes"))


def arguments(shards: Path, runs_dir: Path, ranks: int, *settings: str) -> list[str]:
    own = (f"micro_batch={8 // ranks}", "optimizer.lr=3e-3", "data.max_bad_fraction=1", "data.image_size=112")
    return runs.arguments(shards, runs_dir, *own, BUCKETS, *settings)


def train(shards: Path, runs_dir: Path, ranks: int, *settings: str) -> Path:
    ended = ranked.bifrost(ranks, *arguments(shards, runs_dir, ranks, *settings))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return runs_dir / "tiny-mllm"


@pytest.mark.parametrize(
    "settings",
    [
        ("branch.loss_tokens=all", "branch.positions=mrope", "branch.draws=2", "data.workers=1"),
        ("branch.loss_tokens=masked", "branch.positions=learned", "activation_checkpointing=true"),
        ("branch.loss_tokens=masked", "branch.positions=interleaved", "branch.head=flow", "branch.flow_head.layers=1"),
    ],
    ids=["all-mrope-draws", "masked-learned-recomputed", "masked-interleaved-flow"],
)
def test_ranks_and_resumes_equal_plain_pytorch(shapes: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    settings = ("steps=6", *settings)
    recipe = load_recipe("tiny-mllm", arguments(shapes, tmp_path, 1, *settings)[2:])
    plan = opened.inputs(recipe).plan
    assert sorted({plan.bucket(batch) for batch in range(6)}) == [0, 1, 2], "all shapes are trained on"
    wanted = plain.losses(recipe)
    digests = set()
    for ranks in (1, 2, 4):
        run = train(shapes, tmp_path / str(ranks), ranks, *settings)
        np.testing.assert_allclose(runs.losses(run), wanted, rtol=1e-5)
        digests.add(tuple(line["data_digest"] for line in runs.steps(run)))
    for ranks, steps in ((2, 2), (1, 3), (4, 5), (2, 6)):
        run = train(shapes, tmp_path / "parts", ranks, *settings, f"steps={steps}")
    np.testing.assert_allclose(runs.losses(run), wanted, rtol=1e-5)
    digests.add(tuple(line["data_digest"] for line in runs.steps(run)))
    assert len(digests) == 1, "another sequence of samples on another number of ranks"


def test_a_resumed_run_is_equal_to_the_bit(shapes: Path, tmp_path: Path) -> None:
    settings = ("precision=bf16", "steps=6", "checkpoint.every=3", "ema.decay=0.9", "branch.positions=learned")
    run = train(shapes, tmp_path, 2, *settings)
    undisturbed = runs.steps(run)
    last = {file.name: file.read_bytes() for file in (run / "checkpoints/step-00000006").glob("*.safetensors")}
    shutil.rmtree(run / "checkpoints/step-00000006")
    train(shapes, tmp_path, 2, *settings)
    exact = ("step", "loss", "loss_masked", "grad_norm", "data_digest")
    lines = ([[line[key] for key in exact] for line in each] for each in (runs.steps(run), undisturbed))
    assert next(lines) == next(lines)
    assert {file.name: file.read_bytes() for file in (run / "checkpoints/step-00000006").glob("*.safetensors")} == last


def test_a_batch_has_the_masks_and_the_loss_of_its_grid(shapes: Path, tmp_path: Path) -> None:
    """Masks drawn for rows x columns patches, pixels cropped to the shape, and the loss as the mean over its patches,
    from the model's own predictions."""
    settings = ("steps=6", "branch.loss_tokens=all", "branch.positions=mrope")
    recipe = load_recipe("tiny-mllm", arguments(shapes, tmp_path, 1, *settings)[2:])
    inputs, model = plain.loaded(recipe)
    data = open_dataset(f"{shapes}/train-*.tar")
    for step, batch in enumerate(plain.batches(recipe, inputs)):
        located, arrays = inputs.plan.locate(np.arange(8 * step, 8 * step + 8)), batch.arrays
        rows, columns = grid = GRIDS[inputs.plan.bucket(step)]
        patches = rows * columns
        counts = hidden_counts(recipe.branch.mask_rate, 0, located.epoch, located.index, patches)
        assert np.array_equal(arrays["mask"], draw_masks(0, located.epoch, located.index, counts, patches))
        assert arrays["images"].shape == (8, 3, 28 * rows, 28 * columns)
        if not batch.replaced:
            raw = data.read(int(located.shard[0]), int(located.sample[0]))
            (pixels,) = decode_shapes(raw.image, [(28 * rows, 28 * columns)])
            assert np.array_equal(arrays["images"][0].permute(1, 2, 0), pixels)
        with torch.no_grad():
            found = model(**arrays, normalizer=inputs.normalizer(step, 1))
            latents = model.patch_latents(arrays["images"])
            prefix = model.backbone.prefix(arrays["input_ids"], PrefixLayout.of(arrays["text_lengths"], patches))
            hidden = model.branch(latents, arrays["mask"], prefix, grid=grid)
        wanted = (model.head(hidden.flatten(0, 1)) - latents.flatten(0, 1)).double().square().mean()
        assert found.loss.item() == pytest.approx(float(wanted), rel=1e-5)


def test_a_run_records_replays_and_validates(shapes: Path, tmp_path: Path) -> None:
    held_out = shaped_shards.save(tmp_path / "held-out", 2, first=100)
    settings = ("steps=4", "checkpoint.every=2", f"validation.shards={held_out}", "validation.every=2")
    recipe = load_recipe("tiny-mllm", arguments(shapes, tmp_path, 2, *settings)[2:])
    inputs = opened.inputs(recipe)
    run = train(shapes, tmp_path, 2, *settings)
    seen = set()
    for step in (2, 3, 4):
        found = runs.replay(run, f"--step={step}")
        assert found["data_digest"] == found["logged_data_digest"]
        bucket = inputs.plan.bucket(step - 1)
        seen.add(bucket)
        assert {sample["bucket"] for sample in found["samples"]} == {SHAPES[bucket]}
        patches = math.prod(GRIDS[bucket])
        for sample in found["samples"]:
            assert len(sample["hidden"]) == round(patches * sample["mask_rate"])
            assert max(sample["hidden"]) < patches
        if found["weights_exact"]:
            assert found["loss"] == pytest.approx(found["logged_loss"], rel=1e-5)
    assert len(seen) > 1
    one = train(shapes, tmp_path / "one", 1, *settings)
    values, alone = ([line["val_loss"] for line in runs.lines(each) if line.get("val_loss")] for each in (run, one))
    assert len(values) == 2
    np.testing.assert_allclose(values, alone, rtol=1e-5)
