"""Low-rank pairs against a full branch with the merged weights: equal results, gradients by the chain rule."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opened
import ranked
from bifrost.kernels import PrefixLayout
from bifrost.recipes import RecipeError, load_recipe
from bifrost.trainer.models.backbone import read_config
from bifrost.trainer.models.eight_bits import dequantized
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.low_rank import AdaptedLinear
from bifrost.trainer.models.weights import WeightFiles
from bifrost.trainer.stages.patch_latent_model import PatchLatentModel

LORA = ("branch.weights=lora", "branch.lora.rank=3", "branch.lora.alpha=6")


def build(*overrides: str, place: str = "sharded", seed: int = 0) -> PatchLatentModel:
    recipe, folder = load_recipe("tiny-mllm", overrides), locate("builtin:tiny")
    settings: Any = recipe.branch, recipe.data.image_size, recipe.activation_checkpointing
    model = PatchLatentModel(read_config(folder), *settings, place=place, held=recipe.backbone.weights)
    model.load(WeightFiles(folder), seed)
    return model


def merge(full: PatchLatentModel, paired: PatchLatentModel, scale: float) -> dict[str, tuple[nn.Parameter, Any]]:
    """Set the full branch's weights to base + scale B A; name -> its weight and the pair's module."""
    found = {}
    own = dict(full.branch.named_modules())
    for name, module in paired.branch.named_modules():
        if isinstance(module, AdaptedLinear):
            base: Any = module.base
            weight = dequantized(base.weight, getattr(base, "scale", None), torch.float32)
            if module.lora_A is not None and module.lora_B is not None:
                weight = weight + scale * module.lora_B @ module.lora_A
                found[name] = own[name].weight, module
            own[name].weight.data.copy_(weight.detach())
    rest = {name: p for name, p in paired.trainable().items() if "lora" not in name}
    for name, parameter in rest.items():
        full.trainable()[name].data.copy_(parameter.data)
    return found


def loss(model: PatchLatentModel) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    ids, layout = torch.arange(20, 44), PrefixLayout.of([12, 12], 16)
    latents, mask = torch.randn(2, 16, 192, generator=generator), torch.rand(2, 16, generator=generator) < 0.8
    masked = mask.flatten().nonzero()[:, 0]
    return model.losses(latents, mask, masked, model.backbone.prefix(ids, layout), 32.0).loss


def test_at_the_start_the_branch_is_the_frozen_copy() -> None:
    assert loss(build(*LORA)).item() == pytest.approx(loss(build()).item(), rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("activation_checkpointing=true",),
        ("branch.lora.targets=[k_proj, down_proj]", "branch.layers=3"),
        ("branch.lora.targets=[o_proj, gate_proj]", "branch.positions=mrope"),
        ("backbone.weights=int8",),
        ("backbone.weights=fp8", "branch.lora.targets=[v_proj]"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("place", ["sharded", "replicated"])
def test_gradients_are_those_of_the_merged_weights(settings: tuple[str, ...], place: str) -> None:
    paired = build(*LORA, *settings, place=place)
    # The prefix is the same: it is computed with the same frozen weights.
    full = build(*(one for one in settings if "lora" not in one), place=place)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in paired.trainable().items():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.02, generator=generator)
    pairs = merge(full, paired, scale=2.0)
    targets = load_recipe("tiny-mllm", [*LORA, *settings]).branch.lora.targets
    assert {name.rpartition(".")[2] for name in pairs} == set(targets)
    found, wanted = loss(paired), loss(full)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    found.backward()
    wanted.backward()
    for name, (weight, module) in pairs.items():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name
        close(module.lora_A.grad, 2.0 * module.lora_B.T @ weight.grad)
        close(module.lora_B.grad, 2.0 * weight.grad @ module.lora_A.T)
    for name, parameter in paired.trainable().items():
        if "lora" not in name:
            close(parameter.grad, full.trainable()[name].grad)


def close(found: Tensor | None, wanted: Tensor | None) -> None:
    assert found is not None and wanted is not None
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("place", ["sharded", "replicated"])
def test_the_frozen_weights_are_stored_once(place: str) -> None:
    model = build(*LORA, place=place)
    layer: Any = model.branch.layers[1]
    assert layer.mlp.up_proj.base is model.backbone.text.layers[1].mlp.up_proj
    trained = {re.sub(r"layers\.\d", "layers.N", name) for name in model.trainable()}
    projections = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    assert trained == {
        *(f"branch.layers.N.{name}_proj.lora_{factor}" for name in projections for factor in "AB"),
        *(f"branch.layers.N.{name}layernorm.weight" for name in ("input_", "post_attention_")),
        *("branch.norm.weight", "branch.mask_token", "branch.positions", "head.weight", "head.bias"),
    }


def test_pairs_follow_the_seed_and_start_without_effect() -> None:
    """The first factor as peft's kaiming_uniform_(a=sqrt(5)), the second zero."""
    first, again, other = build(*LORA).trainable(), build(*LORA).trainable(), build(*LORA, seed=1).trainable()
    name = "branch.layers.2.mlp.down_proj.lora_A"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["branch.layers.3.mlp.down_proj.lora_A"])
    torch.manual_seed(0)
    drawn = nn.init.kaiming_uniform_(torch.empty(first[name].shape), a=5**0.5)
    assert first[name].std().item() == pytest.approx(drawn.std().item(), rel=0.05)
    assert first[name].abs().max().item() == pytest.approx(drawn.abs().max().item(), rel=0.02)
    assert all(not p.any() for name, p in first.items() if name.endswith("lora_B"))


def slices_under_zero_init() -> bool:
    """Whether this rank's slices of the first factors are parts of those drawn in one process."""
    from bifrost.trainer.distributed.process_group import join
    from bifrost.trainer.optim.engine import partitioned

    recipe, folder = load_recipe("tiny-mllm", list(LORA)), locate("builtin:tiny")
    whole = build(*LORA).trainable()
    ranks = join()
    with partitioned(opened.deepspeed(recipe, ranks.size), ranks.device):
        model = PatchLatentModel(read_config(folder), recipe.branch, recipe.data.image_size)
    model.load(WeightFiles(folder), seed=0)
    own = {name: p.ds_tensor.float() for name, p in model.trainable().items() if "lora_A" in name}
    return all(
        torch.equal(part, whole[name].flatten().bfloat16().float().chunk(2)[ranks.rank]) for name, part in own.items()
    )


@pytest.mark.multi
def test_pairs_do_not_depend_on_the_ranks() -> None:
    for rank in ranked.run(slices_under_zero_init, 2):
        assert rank.value is True, rank.err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["branch.lora.rank=4"], "branch: branch.lora has no effect with branch.weights=full; set branch.weights=lora"),
        (["branch.weights=lora", "branch.init=random"], "branch.init=random: with branch.weights=lora the branch's"),
        (["branch.weights=lora", "branch.lora.targets=[]"], "branch.lora.targets: list should have at least 1 item"),
        (["branch.weights=lora", "branch.lora.targets=[qkv]"], "branch.lora.targets.0: input should be 'q_proj', "),
        (["branch.weights=lora", "branch.lora.rank=0"], "branch.lora.rank: input should be greater than or equal to 1"),
    ],
)
def test_mistakes_are_one_line(settings: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny-mllm", settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)
