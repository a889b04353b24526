"""Masked decoding: counts, orders, guidance, and the public loop's latents at a fraction of its cost."""

import time
from collections.abc import Callable
from functools import partial
from itertools import chain

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb, repeat_kv

from bifrost.kernels import PrefixLayout
from bifrost.recipes import Recipe
from bifrost.trainer.errors import RunError
from bifrost.trainer.inference.masked_decoding import decode, draw_orders, reveal_counts
from bifrost.trainer.models.backbone import Prefix
from bifrost.trainer.stages.patch_latent_model import PatchLatentModel

PROMPTS = [[5, 9, 2, 7, 7, 1], [3, 4, 8], [6, 1, 2, 3, 4, 5, 6, 7, 8]]
NULL = [3, 1]
SIXTEEN = [2, 3, 7, 8, 11, 13, 15, 16, 19, 20, 22, 23, 23, 25, 24, 25]


pytestmark = pytest.mark.usefixtures("one_thread")


def build(side: int, positions: str = "learned", width: int = 32) -> PatchLatentModel:
    """A random model whose branch differs from its copied weights."""
    text = {
        "vocab_size": 32,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [width // 8 - 2 * (width // 24), width // 24, width // 24],
        },
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    recipe = Recipe.model_validate(
        {
            "stage": "patch-latents",
            "name": "decoding",
            "steps": 1,
            "global_batch": 1,
            "micro_batch": 1,
            "precision": "fp32",
            "backbone": {"path": "unused"},
            "branch": {"positions": positions},
            "data": {"shards": "unused", "image_size": 28 * side},
        }
    )
    model = PatchLatentModel(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision), recipe.branch, recipe.data.image_size
    ).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5, generator=draw)
            if "norm" in name:
                parameter.add_(1)
    model.restore_rotary()
    return model


def prefix_of(model: PatchLatentModel, prompts: list[list[int]]) -> Prefix:
    layout = PrefixLayout.of([len(prompt) for prompt in prompts], model.branch.side**2)
    return model.backbone.prefix(torch.tensor([*chain(*prompts)]), layout)


def decoded(model: PatchLatentModel, prompts: list[list[int]], orders: Tensor, guidance: float = 1.0, **how) -> Tensor:
    both = prompts if guidance == 1 else prompts + [NULL] * len(prompts)
    counts = reveal_counts(orders.shape[1], **how)
    return decode(model.branch, model.head, prefix_of(model, both), orders, counts, guidance)


@torch.no_grad()
def public_loop(
    model: PatchLatentModel, prompts: list[list[int]], orders: Tensor, weight: float, steps: int | None = None
) -> Tensor:
    """The released decoding: both branches on all tokens of 2 B left-padded rows, no cache, one patch per step.

    steps: stop after so many.
    """
    samples, patches = orders.shape
    rows = prompts + [NULL] * samples
    longest = max(map(len, rows))
    padding = torch.tensor([longest - len(row) for row in rows])
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    length = longest + patches
    place = torch.arange(length)
    is_image = place >= longest
    real = place[None] >= padding[:, None]
    seen = (place[None, :] <= place[:, None]) | (is_image[:, None] & is_image[None, :])
    mask = torch.where(seen & real[:, None, :], 0.0, torch.finfo(torch.bfloat16).min)[:, None]
    text_positions = torch.where(real, place - padding[:, None], 1)[:, :longest].expand(3, -1, -1)
    image_positions = model.branch.position_ids(longest - padding)
    table = model.branch.positions if model.branch.positions is not None else 0.0
    route = is_image.float()[:, None]

    def routed(theirs, ours, hidden: Tensor) -> Tensor:
        return ours(hidden) * route + theirs(hidden) * (1 - route)

    def forward(image: Tensor) -> Tensor:
        hidden = torch.cat((model.backbone.text.embed_tokens(ids), image + table), dim=1)
        positions = torch.cat((text_positions, image_positions), dim=2)
        rotation = model.branch.rotary_embedding(hidden, positions)
        for theirs, ours in zip(model.backbone.text.layers, model.branch.layers, strict=True):
            a, b = theirs.self_attn, ours.self_attn
            normed = routed(theirs.input_layernorm, ours.input_layernorm, hidden)
            q, k, v = (
                routed(getattr(a, name), getattr(b, name), normed)
                .view(len(rows), length, -1, a.head_dim)
                .transpose(1, 2)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            q, k = apply_rotary_pos_emb(q, k, *rotation)
            k, v = (repeat_kv(x, a.num_key_value_groups) for x in (k, v))
            scores = (q @ k.transpose(2, 3) * a.head_dim**-0.5 + mask).softmax(dim=-1) @ v
            hidden = hidden + routed(a.o_proj, b.o_proj, scores.transpose(1, 2).reshape(len(rows), length, -1))
            normed = routed(theirs.post_attention_layernorm, ours.post_attention_layernorm, hidden)
            hidden = hidden + routed(theirs.mlp, ours.mlp, normed)
        return model.head(routed(model.backbone.text.norm, model.branch.norm, hidden)[:, longest:])

    latents = model.branch.mask_token.repeat(samples, patches, 1)
    for step in range(steps or patches):
        conditional, free = forward(latents.repeat(2, 1, 1)).chunk(2)
        predicted = free + weight * (conditional - free)
        now = orders[:, step, None, None].expand(-1, 1, latents.shape[-1])
        latents.scatter_(1, now, predicted.gather(1, now))
    return latents


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("tokens", [1, 2, 16, 49, 256])
def test_every_step_reveals_some_and_all_reveal_everything(tokens: int, schedule) -> None:
    for steps in range(1, tokens + 1):
        counts = reveal_counts(tokens, steps, schedule)
        assert len(counts) == steps and sum(counts) == tokens and min(counts) >= 1
    assert counts == [1] * tokens


def test_schedules() -> None:
    assert reveal_counts(256, 8) == [5, 15, 24, 31, 39, 45, 48, 49]
    assert reveal_counts(256, 16) == SIXTEEN
    assert reveal_counts(16, 4, "linear") == [4] * 4
    assert reveal_counts(10, 4, "linear") == [3, 2, 3, 2]
    for steps in (0, 17):
        with pytest.raises(RunError, match=f"^{steps} decoding steps for 16 patches: set 1 to 16$"):
            reveal_counts(16, steps)


def test_an_order_depends_on_the_seed_only() -> None:
    orders = draw_orders([7, 3, 7, 2**62], 16)
    assert orders.sort(dim=1).values.tolist() == [list(range(16))] * 4
    assert torch.equal(orders[0], orders[2]) and torch.equal(orders[1], draw_orders([3], 16)[0])
    assert not torch.equal(orders[0], orders[1])
    firsts = draw_orders(range(1600), 16)[:, 0].bincount(minlength=16)
    assert firsts.min() > 60 and firsts.max() < 145  # 100 expected, standard deviation 9.7


@pytest.mark.parametrize("positions", ["learned", "mrope", "interleaved"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_one_patch_per_step_is_the_public_loop(positions: str, guidance: float) -> None:
    model = build(4, positions, width=48)
    orders = draw_orders([1, 2, 3], 16)
    found = decoded(model, PROMPTS, orders, guidance, steps=16)
    wanted = public_loop(model, PROMPTS, orders, guidance)
    assert wanted.std() > 0.3 and (wanted[0] - wanted[1]).abs().mean() > 0.1
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_guidance_with_several_patches_per_step(schedule) -> None:
    """Against one forward pass per sample, prompt and step, and an assignment per patch."""
    model = build(4)
    orders = draw_orders([4, 5, 6], 16)
    found = decoded(model, PROMPTS, orders, 3.0, steps=5, schedule=schedule)
    counts = reveal_counts(16, 5, schedule)
    assert max(counts) > 2
    for sample, prompt in enumerate(PROMPTS):
        latents, hidden = torch.zeros(1, 16, 32), torch.ones(1, 16, dtype=torch.bool)
        order = iter(orders[sample].tolist())
        for count in counts:
            predicted = []
            for tokens in (prompt, NULL):
                with torch.no_grad():
                    predicted.append(model.head(model.branch(latents, hidden, prefix_of(model, [tokens])))[0])
            conditional, free = predicted
            for _ in range(count):
                patch = next(order)
                latents[0, patch] = free[patch] + 3.0 * (conditional[patch] - free[patch])
                hidden[0, patch] = False
        assert not hidden.any()
        torch.testing.assert_close(found[sample], latents[0], atol=2e-5, rtol=0)


def test_guidance_of_one_needs_no_unconditional_prompts() -> None:
    model = build(4)
    orders = draw_orders([4, 5, 6], 16)
    rows = []
    handle = model.branch.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    plain = decoded(model, PROMPTS, orders, steps=4)
    assert rows == [3] * 4
    twice = decoded(model, PROMPTS, orders, 1.0 + 1e-7, steps=4)
    handle.remove()
    assert rows == [3] * 4 + [6] * 4
    torch.testing.assert_close(plain, twice, atol=2e-5, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_an_image_is_independent_of_its_batch(guidance: float) -> None:
    model = build(4)
    together = decoded(model, PROMPTS, draw_orders([8, 9, 10], 16), guidance, steps=6)
    alone = decoded(model, PROMPTS[1:2], draw_orders([9], 16), guidance, steps=6)
    torch.testing.assert_close(together[1], alone[0], atol=1e-5, rtol=0)
    # The same shapes: to the bit, whoever else is in the batch.
    others = decoded(
        model, [PROMPTS[0][::-1], PROMPTS[1], PROMPTS[2][::-1]], draw_orders([3, 9, 4], 16), guidance, steps=6
    )
    assert torch.equal(together[1], others[1])


def test_a_fraction_of_the_public_loops_cost() -> None:
    """16 steps against the 144 of the loop, which computes both prompts even with guidance 1."""
    model = build(12, width=48)
    prompts = [[*range(1, 25)], [*range(2, 26)]]
    orders = draw_orders([1, 2], 144)

    def flops(work: Callable[[], Tensor]) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return float(counter.get_total_flops())

    def seconds(work: Callable[[], Tensor]) -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    # Every step of the loop is the same work.
    their_flops = 144 * flops(lambda: public_loop(model, prompts, orders, 1.0, steps=1))
    theirs = seconds(lambda: public_loop(model, prompts, orders, 1.0))
    for guidance, fewer, faster in ((1.0, 20, 10), (2.5, 20, 5)):
        work = partial(decoded, model, prompts, orders, guidance, steps=16)
        less, ours = their_flops / flops(work), min(seconds(work) for _ in range(3))
        print(
            f"guidance {guidance}: {less:.1f}x fewer FLOPs, {theirs / ours:.1f}x faster ({theirs:.2f} s, {ours:.3f} s)"
        )
        assert less >= fewer and theirs >= faster * ours
