"""The flow head: loss and gradients of its definition, samples of a distribution with two modes where the linear head
gives their mean."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bifrost.kernels import PatchLatentHead
from bifrost.recipes.branch import FlowHeadSettings
from bifrost.trainer.models.flow_head import FlowHead, guided
from bifrost.trainer.models.rng import Stream, states, uniform

pytestmark = pytest.mark.usefixtures("one_thread")


def head(latents: int, activation_checkpointing: bool = False, **settings: int) -> FlowHead:
    """A random head in fp64, none of whose layers is zero."""
    made = FlowHead(latents, FlowHeadSettings(**settings), activation_checkpointing).double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3, generator=draw)
        made.mean.normal_(generator=draw)
        made.std.uniform_(0.5, 2, generator=draw)
    return made


def plain_clean(made: FlowHead, noisy: Tensor, level: Tensor, hidden: Tensor) -> Tensor:
    """The network from its weights, by their names."""
    weights = dict(made.named_parameters())

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    condition = linear("condition", hidden)
    angles = level[:, None] * 1000 ** (torch.arange(128, dtype=torch.float64) / 127)
    x = linear("noisy", noisy) + condition
    y = F.silu(condition + linear("level", torch.cat((angles.sin(), angles.cos()), 1)))
    for number in range(len(made.blocks)):
        block = f"blocks.{number}."
        shift, scale, gate = linear(block + "modulation", y).chunk(3, 1)
        x = x + gate * linear(block + "down", F.silu(linear(block + "up", norm(x) * (1 + scale) + shift)))
    shift, scale = linear("modulation", y).chunk(2, 1)
    return linear("clean", norm(x) * (1 + scale) + shift)


@pytest.mark.parametrize("recomputed", [False, True])
def test_loss_and_gradients_are_those_of_the_definition(recomputed: bool) -> None:
    """Against plain PyTorch in fp64: every draw of every token by itself, with the loader's random numbers."""
    width, draws, tokens = 6, 3, 4
    made = head(width, recomputed, layers=2, width=10, draws=draws)
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, width, dtype=torch.float64, generator=draw).requires_grad_()
    target = torch.randn(tokens, width, dtype=torch.float64, generator=draw)
    epoch, index, places = np.array([0, 0, 1, 1]), np.array([5, 5, 9, 9]), [0, 3, 2, 7]
    streams = Stream.LATENT_NOISE, Stream.LATENT_NOISE_LEVEL
    own = np.stack([states(3, stream, epoch, index) for stream in streams], 1)
    loss, squares = made.loss(hidden, target, 2.5, torch.from_numpy(own.view(np.int64)), torch.tensor(places))
    loss.backward()
    found = {name: p.grad.clone() for name, p in made.named_parameters()} | {"hidden": hidden.grad.clone()}
    made.zero_grad()
    hidden.grad = None

    errors = torch.zeros(tokens, draws, dtype=torch.float64)
    clean = (target - made.mean) / made.std
    for token, place in enumerate(places):
        e, i = epoch[token : token + 1], index[token : token + 1]
        noises = uniform(3, streams[0], e, i, 8 * draws * width)[0].reshape(8, draws, width)[place]
        levels = uniform(3, streams[1], e, i, 8 * draws)[0].reshape(8, draws)[place]
        for number in range(draws):
            noise = torch.special.ndtri(torch.from_numpy(noises[number])).float().double()
            normal = torch.special.ndtri(torch.tensor(levels[number], dtype=torch.float64)).float()
            t = (2 + 1.2 * normal).sigmoid().clamp(min=0.05).double()
            noisy = (1 - t) * clean[token] + t * noise
            predicted = plain_clean(made, noisy[None], t[None], hidden[token][None])[0]
            velocity = (noisy - predicted) / t
            errors[token, number] = (velocity - (noise - clean[token])).square().mean()
    wanted = errors.mean(1)
    torch.testing.assert_close(squares, wanted.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(loss, wanted.sum() / 2.5, rtol=1e-10, atol=0)
    (wanted.sum() / 2.5).backward()
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-12, msg=name)
    torch.testing.assert_close(found["hidden"], hidden.grad, rtol=1e-8, atol=1e-12)


def test_sampling_follows_the_velocity() -> None:
    """Euler steps of the velocity that classifier-free guidance gives, against its definition."""
    made = head(5, layers=1, steps=4)
    draw = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 3, 5, dtype=torch.float64, generator=draw)
    noise = torch.randn(3, 5, dtype=torch.float64, generator=draw)
    with torch.no_grad():
        z = noise
        # Equal steps of u in t = e^2 u / (1 + (e^2 - 1) u).
        steps = [math.e**2 * u / (1 + (math.e**2 - 1) * u) for u in (1, 0.75, 0.5, 0.25, 0)]
        for t, following in itertools.pairwise(steps):
            levels = torch.full((3,), t, dtype=torch.float64)
            with_text, without = ((z - plain_clean(made, z, levels, each)) / t for each in hidden)
            z = z - (t - following) * (without + 1.5 * (with_text - without))
        torch.testing.assert_close(made.sample(hidden, noise, 1.5), z * made.std + made.mean, rtol=1e-4, atol=1e-4)
        alone = made.sample(hidden[:1], noise)
        assert torch.equal(made.sample(hidden[:1, 1:], noise[1:]), alone[1:]), "another token's noise has an effect"


def test_guidance_is_off_with_one_prediction() -> None:
    found = torch.arange(6.0).view(2, 3)
    assert torch.equal(guided(found[None], 3.0), found)
    assert torch.equal(guided(torch.stack((found, found - 1)), 2.0), found + 1)


def test_statistics_stay_fp32() -> None:
    made = FlowHead(4, FlowHeadSettings()).bfloat16()
    assert {buffer.dtype for buffer in made.buffers()} == {torch.float32}
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}


def test_two_modes_are_drawn_where_the_linear_head_gives_their_mean() -> None:
    """Latents at +m(h) or -m(h), with equal probability: what a caption with two possible images is."""
    width, batch = 8, 256
    torch.manual_seed(0)
    mapping = torch.randn(width, width) / math.sqrt(width)
    linear, flow = PatchLatentHead(width), FlowHead(width, FlowHeadSettings(layers=2, width=64, draws=2))
    for last in (flow.clean, flow.modulation, *(block.modulation for block in flow.blocks)):
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    adam = torch.optim.Adam([*linear.parameters(), *flow.parameters()], lr=2e-3)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(count, width)
        mode = hidden @ mapping
        mode = 3 * mode / mode.norm(dim=1, keepdim=True)
        return hidden, mode

    for step in range(700):
        hidden, mode = draw(batch)
        target = mode * (torch.randint(2, (batch, 1)) * 2 - 1)
        own = torch.randint(2**62, (batch, 2))
        both = linear(hidden, target, None, batch)[0] + flow.loss(hidden, target, batch, own, torch.arange(batch))[0]
        adam.zero_grad()
        both.backward()
        adam.step()
        if step == 500:
            adam.param_groups[0]["lr"] = 5e-4
    hidden, mode = draw(512)
    with torch.no_grad():
        regressed, samples = linear(hidden), flow.sample(hidden[None], torch.randn(512, width))
    assert regressed.norm(dim=1).mean() < 0.6, "the mean of both modes is zero; each has norm 3"
    side = (samples * mode).sum(1).sign()
    distance = (samples - side[:, None] * mode).norm(dim=1)
    assert (distance < 1.0).float().mean() > 0.9, distance
    assert 0.4 < (side > 0).float().mean() < 0.6
