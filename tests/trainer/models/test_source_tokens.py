"""A prompt with a source image is read as Qwen2.5-VL itself reads it, and does not depend on what is trained."""

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from bifrost.kernels import PrefixLayout
from bifrost.recipes import load_recipe
from bifrost.trainer.models.backbone import Prefix, pixel_patches, read_config
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.prompt import PromptTemplate, load_tokenizer
from bifrost.trainer.models.source_tokens import SourceTokens
from bifrost.trainer.models.weights import WeightFiles
from bifrost.trainer.stages.patch_latent_model import PatchLatentModel

FOLDER = locate("builtin:tiny")
CAPTIONS = ["make the red circle blue", "two owls", "remove it"]


@pytest.fixture(scope="module")
def vanilla() -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def template() -> PromptTemplate:
    return PromptTemplate(load_tokenizer(FOLDER), 64)


def build(*overrides: str) -> PatchLatentModel:
    recipe = load_recipe("tiny-mllm", overrides)
    model = PatchLatentModel(read_config(FOLDER), recipe.branch, recipe.data.image_size)
    model.load(WeightFiles(FOLDER), seed=0)
    return model


def images(count: int, height: int, width: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=draws)


def packed(
    model: PatchLatentModel, template: PromptTemplate, sources: torch.Tensor
) -> tuple[torch.Tensor, PrefixLayout, SourceTokens]:
    """The first and the last of CAPTIONS with a source image, the one between without."""
    grid = model.backbone.grid(sources)
    count = grid[0] * grid[1]
    ids, lengths = template.batch(CAPTIONS, [count, 0, count])
    begins = (template.source_begin, None, template.source_begin)
    tokens = SourceTokens.of(model.backbone.patch_latents(sources), lengths, begins, grid)
    return ids, PrefixLayout.of(lengths, model.branch.side**2), tokens


def theirs(vanilla: Qwen2_5_VLForConditionalGeneration, ids: torch.Tensor, shown: torch.Tensor) -> dict:
    """Arguments of transformers' model for a prompt [T] with these images, all of one size."""
    grid = torch.tensor([[1, shown.shape[2] // 14, shown.shape[3] // 14]]).expand(len(shown), 3)
    return {
        "input_ids": ids[None],
        "mm_token_type_ids": (ids == vanilla.config.image_token_id).int()[None],
        **({"pixel_values": pixel_patches(shown, 14, 2, 2), "image_grid_thw": grid} if len(shown) else {}),
    }


@pytest.mark.parametrize(("height", "width"), [(112, 112), (56, 112), (112, 56)])
def test_hidden_states_keys_and_positions_are_those_of_transformers(
    vanilla: Qwen2_5_VLForConditionalGeneration, template: PromptTemplate, height: int, width: int
) -> None:
    model, sources = build(), images(2, height, width)
    ids, layout, tokens = packed(model, template, sources)
    hidden, _ = model.backbone.read(ids, layout, tokens)
    prefix = model.backbone.prefix(ids, layout, tokens)
    lengths, ends = layout.text.lengths, layout.text.ends.tolist()
    for row, shown in enumerate((sources[:1], sources[:0], sources[1:])):
        asked = theirs(vanilla, ids.split(lengths)[row], shown)
        with torch.no_grad():
            wanted = vanilla.model(**asked, use_cache=True)
        here = slice(ends[row], ends[row + 1])
        torch.testing.assert_close(hidden[here], wanted.last_hidden_state[0], atol=1e-5, rtol=0)
        for layer, key, value in zip(wanted.past_key_values.layers, prefix.keys, prefix.values, strict=True):
            torch.testing.assert_close(key[here], layer.keys[0].transpose(0, 1), atol=1e-5, rtol=0)
            torch.testing.assert_close(value[here], layer.values[0].transpose(0, 1), atol=1e-5, rtol=0)
        if len(shown):
            rope = {name: value for name, value in asked.items() if name != "pixel_values"}
            positions, delta = vanilla.model.get_rope_index(**rope)
            assert torch.equal(tokens.positions[:, here], positions[:, 0])
            assert int(tokens.after[row]) == lengths[row] + int(delta)
        else:
            assert torch.equal(tokens.positions[:, here], torch.arange(lengths[row]).expand(3, -1))
            assert int(tokens.after[row]) == lengths[row]


def test_the_untrained_branch_continues_as_the_model_itself_would(
    vanilla: Qwen2_5_VLForConditionalGeneration, template: PromptTemplate
) -> None:
    """Copied weights, native positions, nothing masked: the target is the model's second image, here of one patch."""
    model, sources = build("branch.positions=mrope", "data.image_size=28"), images(2, 112, 84)
    ids, layout, tokens = packed(model, template, sources)
    targets = images(3, 28, 28)
    latents = model.backbone.patch_latents(targets)
    with torch.no_grad():
        prefix = model.backbone.prefix(ids, layout, tokens)
        found = model.branch(latents, torch.zeros(3, 1, dtype=torch.bool), prefix)
    pad = torch.tensor([vanilla.config.image_token_id])
    for row, source in ((0, 0), (2, 1)):
        own = torch.cat((ids.split(layout.text.lengths)[row], pad))
        patches = torch.cat(
            [pixel_patches(each, 14, 2, 2) for each in (sources[source : source + 1], targets[row : row + 1])]
        )
        asked = {
            **theirs(vanilla, own, sources[:1]),
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, 8, 6], [1, 2, 2]]),
        }
        with torch.no_grad():
            wanted = vanilla.model(**asked).last_hidden_state[0, -1:]
        torch.testing.assert_close(found[row], wanted, atol=1e-5, rtol=0)


def test_the_prefix_depends_on_its_own_source_and_on_nothing_that_is_trained(template: PromptTemplate) -> None:
    model, sources = build(), images(2, 112, 112)
    before = model.backbone.prefix(*packed(model, template, sources))
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert equal_rows(before, model.backbone.prefix(*packed(model, template, sources))) == [True, True, True]
    sources[1] = 255 - sources[1]
    assert equal_rows(before, model.backbone.prefix(*packed(model, template, sources))) == [True, True, False]


def equal_rows(one: Prefix, other: Prefix) -> list[bool]:
    """Whether keys and values of each prompt are equal, to the bit."""
    split = [
        [each.split(one.layout.text.lengths) for each in (*prefix.keys, *prefix.values)] for prefix in (one, other)
    ]
    return [all(torch.equal(a[row], b[row]) for a, b in zip(*split, strict=True)) for row in range(3)]
