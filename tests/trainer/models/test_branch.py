"""The branch starts as an exact copy of the text model and attends to the right tokens."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

import opened
import ranked
from bifrost.kernels import PrefixLayout
from bifrost.recipes import load_recipe
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.backbone import read_config
from bifrost.trainer.models.backbone_config import branch_layers
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.weights import WeightFiles
from bifrost.trainer.stages.patch_latent_model import PatchLatentModel


def build(*overrides: str) -> PatchLatentModel:
    recipe = load_recipe("tiny-mllm", overrides)
    folder = locate("builtin:tiny")
    model = PatchLatentModel(read_config(folder), recipe.branch, recipe.data.image_size)
    model.load(WeightFiles(folder), seed=0)
    return model


def copies_under_zero_init() -> list[bool]:
    """Whether every slice of the branch's copied weights equals the text model's, and is a real slice."""
    from bifrost.trainer.distributed.process_group import join
    from bifrost.trainer.optim.engine import partitioned

    recipe = load_recipe("tiny-mllm")
    folder = locate("builtin:tiny")
    with partitioned(opened.deepspeed(recipe, (ranks := join()).size), ranks.device):
        model = PatchLatentModel(read_config(folder), recipe.branch, recipe.data.image_size)
    model.load(WeightFiles(folder), seed=0)
    pairs = [(model.branch.layers, model.backbone.text.layers), (model.branch.norm, model.backbone.text.norm)]
    equal = [
        torch.equal(copy.ds_tensor, source.ds_tensor)
        for ours, theirs in pairs
        for copy, source in zip(ours.parameters(), theirs.parameters(), strict=True)
    ]
    head = model.head.weight
    return [all(equal), head.numel() == 0, head.ds_tensor.numel() * 2 == head.ds_numel, bool(head.ds_tensor.any())]


@pytest.mark.multi
def test_copies_equal_their_source_under_zero_init() -> None:
    for rank in ranked.run(copies_under_zero_init, 2):
        assert rank.value == [True] * 4, rank.err


def test_copies_equal_their_source_and_are_their_own() -> None:
    model = build()
    text = dict(model.backbone.text.named_parameters())
    for name, copy in model.branch.layers.named_parameters():
        assert torch.equal(copy, text[f"layers.{name}"])
        assert copy.data_ptr() != text[f"layers.{name}"].data_ptr()
        assert copy.requires_grad
        assert not text[f"layers.{name}"].requires_grad


def test_rotary_tables_are_on_the_device_of_the_weights() -> None:
    """They are rebuilt after the model, outside `zero.Init`, which would place tensors."""
    model = build("branch.positions=mrope").to("meta")
    model.branch.restore_rotary()
    assert {buffer.device.type for buffer in model.branch.buffers()} == {"meta"}


def test_fresh_weights_follow_the_seed_and_mar() -> None:
    first, again = build("branch.positions=learned"), build("branch.positions=learned")
    for name in ("branch.mask_token", "branch.positions", "head.weight", "head.bias"):
        assert torch.equal(first.trainable()[name], again.trainable()[name])
    assert first.branch.positions.std().item() == pytest.approx(0.02, rel=0.05)
    assert first.branch.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(first.branch.positions[:, :1], first.branch.mask_token)


def test_untrained_branch_reproduces_vanilla_qwen() -> None:
    """Copied weights, native positions, nothing masked: with one image token the model is the vanilla one."""
    model = build("branch.positions=mrope", "data.image_size=28")
    vanilla = Qwen2_5_VLForConditionalGeneration.from_pretrained(locate("builtin:tiny"), dtype=torch.float32)
    image = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    ids = torch.arange(20, 32)[None]
    latents = model.backbone.patch_latents(image)
    with torch.no_grad():
        embedded = torch.cat((vanilla.get_input_embeddings()(ids), latents), dim=1)
        positions = torch.arange(13).expand(3, 1, -1)
        wanted = vanilla.model.language_model(inputs_embeds=embedded, position_ids=positions).last_hidden_state[:, -1:]
        prefix = model.backbone.prefix(ids[0], PrefixLayout.of([12], 1))
        found = model.branch(latents, torch.zeros(1, 1, dtype=torch.bool), prefix)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def angles_of(embedding: torch.nn.Module, side: int, text: int) -> torch.Tensor:
    """Angles [side, side, C / 2] of the patches after `text` tokens, in (-pi, pi]."""
    index = torch.arange(side * side)
    ids = text + torch.stack((torch.zeros_like(index), index // side, index % side))[:, None]
    cos, sin = embedding(torch.zeros(1), ids)
    return torch.atan2(sin, cos)[0, :, : cos.shape[-1] // 2].view(side, side, -1)


def test_interleaved_positions_turn_rows_and_columns_alike() -> None:
    """Pair i of a head turns by 1e6^(-2 i / C) per row if i is even, per column if it is odd."""
    found = angles_of(build("branch.positions=interleaved").branch.rotary_embedding, side=3, text=2).double()
    rates = [1e6 ** (-2 * i / 32) for i in range(16)]
    for row in range(3):
        for column in range(3):
            turns = [(2 + (column if i % 2 else row)) * rate for i, rate in enumerate(rates)]
            wanted = torch.exp(1j * torch.tensor(turns, dtype=torch.float64))
            torch.testing.assert_close(torch.exp(1j * found[row, column]), wanted, atol=1e-6, rtol=0)


def test_mrope_hardly_tells_columns_apart() -> None:
    """The reason for `interleaved`: with every patch masked, only the rotation differs."""
    moved = {}
    for positions in ("mrope", "interleaved"):
        model = build(f"branch.positions={positions}")
        prefix = model.backbone.prefix(torch.arange(20, 32), PrefixLayout.of([12], 16))
        with torch.no_grad():
            hidden = model.branch(torch.zeros(1, 16, 192), torch.ones(1, 16, dtype=torch.bool), prefix)
        grid = hidden.view(4, 4, 192)
        moved[positions] = [(grid[1:] - grid[:-1]).norm().item(), (grid[:, 1:] - grid[:, :-1]).norm().item()]
    rows, columns = moved["mrope"]
    assert columns < rows / 50
    rows, columns = moved["interleaved"]
    assert rows / 10 < columns < rows * 10


def test_positions_of_a_rectangle_are_qwens_own() -> None:
    """Against transformers' positions of a prompt with an image of 3 x 5 patches."""
    vanilla = Qwen2_5_VLForConditionalGeneration.from_pretrained(locate("builtin:tiny"), dtype=torch.float32).model
    config = vanilla.config
    text, image = [20, 21, config.vision_start_token_id], [config.image_token_id] * 15
    ids = torch.tensor([text + image])
    kinds = torch.tensor([[0] * len(text) + [1] * len(image)])
    wanted, _ = vanilla.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=torch.tensor([[1, 6, 10]]))
    found = build("branch.positions=mrope").branch.position_ids(torch.tensor([3]), (3, 5))
    assert torch.equal(found, wanted[:, :, 3:])


@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (2, 8)])
def test_a_position_table_is_interpolated_like_an_image(grid: tuple[int, int]) -> None:
    """Table and its gradient, against torch's own interpolation."""
    model = build("branch.positions=learned")
    table = model.branch.positions
    assert model.branch.position_table((4, 4)) is table
    square = table.detach().clone().requires_grad_()
    image = square.view(1, 4, 4, -1).permute(0, 3, 1, 2)
    wanted = nn.functional.interpolate(image, grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    found = model.branch.position_table(grid)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(table.grad, square.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "mrope", "interleaved"])
def test_a_rectangle_in_a_pass(positions: str) -> None:
    """The loss of an image of 84 x 140 pixels depends on which rows and columns its patches are in."""
    model = build(f"branch.positions={positions}")
    image = torch.randint(0, 256, (1, 3, 84, 140), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    mask = torch.rand(1, 15, generator=torch.Generator().manual_seed(3)) < 0.7
    batch = {"input_ids": torch.arange(20, 32), "text_lengths": (12,), "mask": mask}
    batch |= {"masked": mask.flatten().nonzero()[:, 0], "images": image, "normalizer": 15.0}
    found, again, turned = (model(**batch, grid=grid).loss for grid in ((3, 5), (3, 5), (5, 3)))
    assert torch.equal(found, again)
    assert not torch.equal(found, turned)


def test_patches_see_all_patches_and_the_caption() -> None:
    model = build()
    ids, layout = torch.arange(20, 32), PrefixLayout.of([12], 16)
    prefix = model.backbone.prefix(ids, layout)
    latents = torch.randn(1, 16, 192, requires_grad=True)
    hidden = model.branch(latents, torch.zeros(1, 16, dtype=torch.bool), prefix)
    hidden[0, 0].sum().backward()
    assert (latents.grad.abs().sum(-1) > 0).all(), "the first patch must see the last"
    other = model.backbone.prefix(ids + 1, layout)
    changed = model.branch(latents, torch.zeros(1, 16, dtype=torch.bool), other)
    assert not torch.allclose(changed, hidden)


def test_masked_latents_are_not_seen() -> None:
    model = build()
    ids, layout = torch.arange(20, 32), PrefixLayout.of([12], 16)
    prefix = model.backbone.prefix(ids, layout)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[:, 3:9] = True
    latents = torch.randn(1, 16, 192)
    changed = latents.clone()
    changed[:, 3:9] = torch.nan
    assert torch.equal(model.branch(latents, mask, prefix), model.branch(changed, mask, prefix))


def test_fewer_layers_are_copies_spread_evenly() -> None:
    """A branch of layers 1 and 3 computes what a full one does whose layers 0 and 2 add nothing."""
    short, full = build("branch.layers=2"), build()
    for ours, index in zip(short.branch.layers, (1, 3), strict=True):
        for one, other in zip(ours.parameters(), full.backbone.text.layers[index].parameters(), strict=True):
            assert torch.equal(one, other)
    for index in (0, 2):
        skipped: Any = full.branch.layers[index]
        nn.init.zeros_(skipped.self_attn.o_proj.weight)
        nn.init.zeros_(skipped.mlp.down_proj.weight)
    ids, layout = torch.arange(20, 44), PrefixLayout.of([12, 12], 16)
    latents, mask = torch.randn(2, 16, 192), torch.rand(2, 16) < 0.8
    for model in (short, full):
        nn.init.ones_(model.branch.positions)
        nn.init.constant_(model.branch.mask_token, 0.5)
    wanted, found = (model.branch(latents, mask, model.backbone.prefix(ids, layout)) for model in (full, short))
    assert torch.equal(found, wanted)
    assert [branch_layers(read_config(locate("builtin:tiny")), n) for n in (1, 3, 4, None)] == [
        (3,),
        (0, 1, 3),
        (0, 1, 2, 3),
        (0, 1, 2, 3),
    ]


def test_more_layers_than_the_text_model_has_are_refused() -> None:
    with pytest.raises(RunError, match=r"^branch\.layers=5: the text model has 4 layers; set at most that many$"):
        build("branch.layers=5")


def test_a_random_branch_is_drawn_like_an_untrained_qwen() -> None:
    """Standard deviations and constants of transformers' own initialisation of the same text model."""
    config = read_config(locate("builtin:tiny")).text_config
    config.initializer_range = 0.05
    torch.manual_seed(1)
    theirs = dict(Qwen2_5_VLTextModel(config).named_parameters())
    first, again, other = (build_random(seed) for seed in (0, 0, 1))
    for name, parameter in first.items():
        wanted = theirs[name]
        if wanted.std() == 0:
            assert torch.equal(parameter, wanted), name
            continue
        assert parameter.std().item() == pytest.approx(wanted.std().item(), rel=0.05)
        assert abs(parameter.mean().item()) < 0.01
        assert torch.equal(parameter, again[name]) and not torch.equal(parameter, other[name])


def build_random(seed: int) -> dict[str, torch.Tensor]:
    """Layers and final norm of a branch with branch.init=random and a standard deviation of 0.05."""
    recipe, folder = load_recipe("tiny-mllm", ["branch.init=random"]), locate("builtin:tiny")
    config = read_config(folder)
    config.text_config.initializer_range = 0.05
    model = PatchLatentModel(config, recipe.branch, recipe.data.image_size)
    model.load(WeightFiles(folder), seed)
    own = dict(model.branch.named_parameters())
    return {name: own[name].detach() for name in own if name.startswith(("layers.", "norm."))}
