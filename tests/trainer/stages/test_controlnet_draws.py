"""Several noise levels per sample in a step of stage 2: draws of the sample, loss and gradients of a step for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import opened
import plain
from bifrost.data import ReadableSamples
from bifrost.recipes import Recipe, load_recipe
from bifrost.trainer.distributed.process_group import Ranks

DRAWN = ("posterior", "noise", "level")
SAMPLES, DRAWS = 4, 3


def recipe(shards: Path, *settings: str) -> Recipe:
    small = ["precision=fp32", f"global_batch={SAMPLES}", f"micro_batch={SAMPLES}", "steps=1", "data.workers=0"]
    small += ["data.shuffle_window=2", f"data.shards={shards}/train-*.tar", "flux.caption_dropout=0.3"]
    return load_recipe("tiny-controlnet", [*small, f"flux.draws={DRAWS}", *settings])


def batch(shards: Path, draws: int) -> dict[str, Any]:
    drawn = recipe(shards, f"flux.draws={draws}")
    return next(iter(plain.batches(drawn, opened.inputs(drawn)))).arrays


def test_further_draws_are_independent_and_change_nothing_else(shards: Path) -> None:
    single, several = batch(shards, 1), batch(shards, DRAWS)
    assert single.keys() == several.keys() >= {"images", "flux_images", "t5", "clip", *DRAWN}
    for name, wanted in single.items():
        found = several[name].unflatten(0, (SAMPLES, DRAWS))[:, 0] if name in DRAWN else several[name]
        assert np.array_equal(found, wanted), name
    assert len(set(several["level"].tolist())) == SAMPLES * DRAWS
    for name in ("posterior", "noise"):
        rows = several[name].flatten(1)
        apart = np.corrcoef(rows.numpy()) - np.eye(SAMPLES * DRAWS)
        assert np.abs(apart).max() < 5 * rows.shape[1] ** -0.5, name
        assert abs(rows.std().item() - 1) < 0.05, name


def test_draws_of_a_sample_are_independent_of_the_batch(shards: Path) -> None:
    inputs = opened.inputs(recipe(shards))
    dataset, collate = inputs.dataset, inputs.stage.collate(inputs.dataset)
    readable = ReadableSamples(dataset, inputs.stage.image_sizes)
    items = [readable.read(2, *dataset.place(number), number, []) for number in range(SAMPLES)]
    together = collate(items)
    for number, item in enumerate(items):
        alone = collate([item])
        for name in DRAWN:
            assert torch.equal(alone[name], together[name][DRAWS * number : DRAWS * (number + 1)]), name


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_draws_of_a_step_average_those_of_single_draws(shards: Path, norm: str) -> None:
    """Loss, every sample's share of it, every gradient and BatchNorm's statistics, against a step for each draw."""
    inputs, model = plain.loaded(recipe(shards, f"controlnet.norm={norm}"))
    draw = torch.Generator().manual_seed(0)
    for parameter in model.trainable().values():
        if not parameter.any():  # a ControlNet begins without effect
            torch.nn.init.normal_(parameter, std=0.05, generator=draw)
    arrays = next(iter(plain.batches(recipe(shards), inputs))).arrays
    assert len(arrays["level"]) == DRAWS * len(arrays["images"]) == DRAWS * SAMPLES
    normalizer = inputs.normalizer(0, 1)
    assert normalizer == arrays["noise"].numel()
    before = {name: buffer.clone() for name, buffer in model.statistics().items()}

    def step(**changed: Any) -> Any:
        for name, buffer in model.statistics().items():
            buffer.copy_(before[name])
        losses = model(**{**arrays, **changed}, normalizer=normalizer)
        losses.loss.backward()
        return losses

    found = step()
    gradients = {name: p.grad.clone() for name, p in model.trainable().items()}
    statistics = {name: buffer.clone() for name, buffer in model.statistics().items()}
    model.zero_grad()
    singles = [
        step(**{name: arrays[name].unflatten(0, (SAMPLES, DRAWS))[:, number] for name in DRAWN})
        for number in range(DRAWS)
    ]
    assert len({single.loss.item() for single in singles}) == DRAWS
    torch.testing.assert_close(found.each, sum(single.each for single in singles), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.loss, sum(single.loss for single in singles), rtol=1e-6, atol=0)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, parameter in model.trainable().items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6 * largest, msg=name)
    for name, buffer in model.statistics().items():
        assert torch.equal(buffer, statistics[name]), name
    assert bool(statistics) == (norm == "batch")


def test_sums_and_normalizers_count_every_draw(shards: Path) -> None:
    inputs, model = plain.loaded(recipe(shards))
    arrays = next(iter(plain.batches(recipe(shards), inputs))).arrays
    losses = model(**arrays, normalizer=inputs.normalizer(0, 1))
    sums = losses.sums.tolist()
    assert sums[1] + sums[3] == arrays["noise"].numel()
    assert inputs.stage.mean_loss(sums) == pytest.approx(losses.loss.item(), rel=1e-5)
    image, text, patches = arrays["noise"].shape[1], arrays["t5"].shape[1], 16
    assert inputs.stage.tokens(sums) == SAMPLES * (DRAWS * (image + text) + patches)
    for ranks in (1, 2, 4):
        assert inputs.normalizer(0, ranks) * ranks == arrays["noise"].numel()


def test_held_out_samples_have_a_single_draw(shards: Path) -> None:
    inputs = opened.inputs(recipe(shards))
    items = [ReadableSamples(inputs.dataset, inputs.stage.image_sizes).read(0, 0, 0, 0, [])]
    collates = inputs.stage.validation_collates(f"{shards}/train-*.tar", Ranks(0, 1, torch.device("cpu")))
    assert len(collates) == 8
    assert all(len(collate(items)[name]) == 1 for collate in collates.values() for name in DRAWN)
