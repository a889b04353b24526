"""Stage 1 batches: random draws depend on the sample, the loss normalizer on the step."""

import numpy as np
import pytest
import torch

import plain
from bifrost.data import Item
from bifrost.recipes import load_recipe
from bifrost.recipes.schema import Branch
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.backbone import read_config
from bifrost.trainer.models.backbone_config import grid_side
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.masking import hidden_counts
from bifrost.trainer.models.prompt import load_tokenizer
from bifrost.trainer.stages import open_patch_latents
from bifrost.trainer.stages.patch_latent_collate import PatchLatentCollate


def branch(*overrides: str) -> Branch:
    return load_recipe("tiny-mllm", overrides).branch


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(locate("builtin:tiny"))


def items(count: int, epoch: int = 0) -> list[Item]:
    image = np.zeros((28, 28, 3), dtype=np.uint8)
    return [Item(epoch, index, f"key-{index}", image + index % 256, f"number {index}") for index in range(count)]


def test_shapes(tokenizer) -> None:
    batch = PatchLatentCollate(tokenizer, branch(), 0, [(4, 4)])(items(3))
    assert batch["images"].shape == (3, 3, 28, 28)
    assert batch["images"].dtype == torch.uint8
    assert batch["images"][2, 0, 0, 0] == 2
    assert batch["mask"].shape == (3, 16)
    assert batch["input_ids"].shape == (sum(batch["text_lengths"]),)
    assert torch.equal(batch["masked"], batch["mask"].flatten().nonzero()[:, 0])


def test_draws_of_a_sample_are_independent_of_the_batch(tokenizer) -> None:
    collate = PatchLatentCollate(tokenizer, branch("branch.caption_dropout=0.5"), 0, [(4, 4)])
    together = collate(items(12))
    for index, item in enumerate(items(12)):
        alone = collate([item])
        assert torch.equal(alone["mask"][0], together["mask"][index])
        assert torch.equal(alone["input_ids"], together["input_ids"].split(together["text_lengths"])[index])
    other = collate(items(12, epoch=1))
    assert not torch.equal(other["mask"], together["mask"])


def test_captions_are_dropped_to_the_empty_template(tokenizer) -> None:
    collate = PatchLatentCollate(tokenizer, branch("branch.caption_dropout=0.25"), 0, [(4, 4)])
    empty = len(collate.template.ids(""))
    lengths = collate(items(2000))["text_lengths"]
    assert abs(lengths.count(empty) / len(lengths) - 0.25) < 0.04


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("tokens", ["all", "masked"])
def test_draws_of_a_step_average_those_of_single_draws(shards, tokens: str) -> None:
    """Loss, every sample's share of it and every gradient, against a step for each mask with a prefix of its own."""
    settings = ["precision=fp32", "global_batch=4", "data.workers=0", "data.shuffle_window=2", "steps=1"]
    settings += ["branch.positions=mrope", f"branch.loss_tokens={tokens}", f"data.shards={shards}/train-*.tar"]
    recipe = load_recipe("tiny-mllm", [*settings, "branch.draws=3"])
    inputs, model = plain.loaded(recipe)
    arrays = next(iter(plain.batches(recipe, inputs))).arrays
    assert len(arrays["mask"]) == 3 * len(arrays["images"]) == 12
    found = model(**arrays, normalizer=inputs.normalizer(0, 1))
    found.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.trainable().items()}
    model.zero_grad()

    masks = arrays["mask"].unflatten(0, (4, 3)).unbind(1)
    each = torch.zeros(4)
    for mask in masks:
        one = arrays | {"mask": mask, "masked": mask.flatten().nonzero()[:, 0]}
        losses = model(**one, normalizer=inputs.normalizer(0, 1))
        losses.loss.backward()
        each += losses.each
    torch.testing.assert_close(found.each, each, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.loss.detach(), each.sum(), rtol=1e-5, atol=0)
    for name, parameter in model.trainable().items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_normalizers_add_up_to_the_whole_batch(ranks: int) -> None:
    """Gradients are averaged over ranks: each rank's sum must be divided by the global count over the ranks."""
    recipe = load_recipe("tiny-mllm", ["branch.loss_tokens=masked"])
    stage = open_patch_latents(recipe)
    epoch, index = np.zeros(32, dtype=np.int64), np.arange(32)
    counts = hidden_counts(recipe.branch.mask_rate, recipe.seed, epoch, index, 16)
    assert counts.min() < counts.max()
    assert stage.normalizer(epoch, index, ranks) * ranks == counts.sum()
    every = open_patch_latents(load_recipe("tiny-mllm", ["branch.loss_tokens=all"]))
    assert every.normalizer(epoch, index, ranks) * ranks == 32 * 16
    several = open_patch_latents(load_recipe("tiny-mllm", ["branch.loss_tokens=masked", "branch.draws=2"]))
    counts = hidden_counts(recipe.branch.mask_rate, recipe.seed, epoch, index, 16, 2)
    assert several.normalizer(epoch, index, ranks) * ranks == counts.sum()


def test_image_sizes() -> None:
    config = read_config(locate("builtin:tiny"))
    assert grid_side(config, 112) == 4
    with pytest.raises(RunError, match="set 84 or 112"):
        grid_side(config, 100)
    with pytest.raises(RunError, match=r"set 28$"):
        grid_side(config, 14)
