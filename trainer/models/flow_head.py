"""A head that models the distribution of a patch latent, not its mean: flow matching per token (Li et al. 2024, MAR).

The branch's hidden state h of a patch conditions a small residual network. From the noisy latent z = (1 - t) x + t e of
noise e ~ N(0, 1) it predicts the clean latent x, from which the velocity follows: e - x = (z - x) / t. Networks
predict high-dimensional clean latents well and their noise badly (Li, He 2025, JiT), so the loss is of the velocity and
the network's output is not. At t = 1 the best prediction is the mean that a linear head regresses.

Legend: R tokens, F noise draws per token, D latent width, W width of the network, C = 2 with guidance, else 1.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...kernels.runtime import accumulator
from ...recipes.branch import FlowHeadSettings
from .buffers import Fp32Buffers
from .draws import gaussian, uniform_lanes

FREQUENCIES = 128
"""Sines and as many cosines of a noise level."""
LEVEL_MEAN, LEVEL_STD, LOWEST_LEVEL = 2.0, 1.2, 0.05
"""Logit-normal noise levels of training, and the lowest: the weight of an error is 1 / t^2. Most are high: in so many
channels even a latent with much noise shows which of the possible ones it is, and the choice is made above t = 0.9."""
EPS = 1e-6


class FlowHead(Fp32Buffers):
    """Residual blocks with adaptive layer norm. `mean` and `std` [D], fp32, normalise the latents; they are measured
    once, before the first step of a run."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, settings: FlowHeadSettings, activation_checkpointing: bool = False) -> None:
        """width: D, which is also that of the hidden states."""
        super().__init__()
        inner = settings.width or width
        self.steps, self.draws = settings.steps, settings.draws
        self.activation_checkpointing = activation_checkpointing
        self.noisy = nn.Linear(width, inner)
        self.condition = nn.Linear(width, inner)
        self.level = nn.Linear(2 * FREQUENCIES, inner)
        self.blocks = nn.ModuleList([_Block(inner) for _ in range(settings.layers)])
        self.modulation = nn.Linear(inner, 2 * inner)
        self.clean = nn.Linear(inner, width)
        # `zero.Init` creates every tensor in the compute dtype, whatever dtype is requested.
        self.register_buffer("mean", torch.zeros(width).float())
        self.register_buffer("std", torch.ones(width).float())

    def forward(self, noisy: Tensor, level: Tensor, condition: Tensor) -> Tensor:
        """Normalised clean latents [R, D] from noisy ones [R, D], their noise levels [R] and conditions [R, W]."""
        hidden = self.noisy(noisy.to(condition.dtype)) + condition
        modulating = F.silu(condition + self.level(_waves(level).to(condition.dtype)))
        recomputed = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            if recomputed:  # blocks draw nothing
                hidden = checkpoint(block, hidden, modulating, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = block(hidden, modulating)
        return self.clean(_modulated(hidden, *self.modulation(modulating).chunk(2, dim=-1)))

    def loss(
        self, hidden: Tensor, target: Tensor, normalizer: float, states: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum over tokens of the squared velocity error, averaged over channels and draws, divided by `normalizer`; and
        the error per token [R], detached. In fp32; fp64 inputs are computed in fp64.

        hidden, target: [R, D]. states [R, 2]: `rng.states` of each token's sample, for noise and noise levels. tokens
        [R]: number of the token among those of its sample.
        """
        exact, draws = accumulator(hidden), self.draws
        lanes = (tokens[:, None] * draws + torch.arange(draws, device=tokens.device)).T.flatten()  # [F R]
        states = states.repeat(draws, 1)
        noise = draw_noise(states[:, 0], lanes, target.shape[1]).to(exact)
        level = draw_levels(states[:, 1], lanes).to(exact)
        clean = ((target.to(exact) - self.mean) / self.std).repeat(draws, 1)
        noisy = torch.lerp(clean, noise, level[:, None])
        found = self(noisy, level, self.condition(hidden).repeat(draws, 1)).to(exact)
        velocity_error = (found - clean) / level[:, None]  # z and its noise cancel
        squares = velocity_error.square().mean(dim=-1).unflatten(0, (draws, -1)).mean(dim=0)
        return squares.sum() / normalizer, squares.detach()

    def sample(self, hidden: Tensor, noise: Tensor, guidance: float = 1.0) -> Tensor:
        """Latents [R, D] in fp32, from noise [R, D] in `steps` Euler steps, given hidden states [C, R, D].

        guidance: of every step's prediction, see `guided`; with it, `hidden` has the unconditional states last.
        """
        copies = len(hidden)
        condition = self.condition(hidden).flatten(0, 1)
        found = noise
        for level, following in pairwise(sampling_levels(self.steps)):
            levels = noise.new_full((len(condition),), level)
            clean = self(found.repeat(copies, 1), levels, condition).unflatten(0, (copies, -1))
            # A part of the straight line to the prediction: in the last step all of it.
            found = found + (guided(clean, guidance) - found) * (1 - following / level)
        return found * self.std + self.mean


class _Block(nn.Module):
    """x + gate * MLP(norm(x) * (1 + scale) + shift), all three linear in the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, hidden: Tensor, modulating: Tensor) -> Tensor:
        """Both [R, W]."""
        shift, scale, gate = self.modulation(modulating).chunk(3, dim=-1)
        return torch.addcmul(hidden, gate, self.down(F.silu(self.up(_modulated(hidden, shift, scale)))))


def guided(found: Tensor, guidance: float) -> Tensor:
    """[R, D] in fp32 from predictions [C, R, D]: uncond + guidance (cond - uncond), or the only one if C is 1."""
    if len(found) == 1:
        return found[0].float()
    conditional, unconditional = found.float()
    return unconditional + guidance * (conditional - unconditional)


def sampling_levels(steps: int) -> list[float]:
    """Noise levels between Euler steps, from 1 to 0: equidistant ones, shifted to the levels of training."""
    shift = math.exp(LEVEL_MEAN)
    return [shift * left / (steps + (shift - 1) * left) for left in range(steps, -1, -1)]


def draw_noise(states: Tensor, lanes: Tensor, width: int) -> Tensor:
    """Standard normal noise [R, width] in fp32, number `lanes` [R] of the streams `states` [R]."""
    channels = torch.arange(width, device=lanes.device)
    return gaussian(uniform_lanes(states[:, None], lanes[:, None] * width + channels))


def draw_levels(states: Tensor, lanes: Tensor) -> Tensor:
    """Noise levels [R] in fp32, number `lanes` [R] of the streams `states` [R]."""
    logits = LEVEL_MEAN + LEVEL_STD * gaussian(uniform_lanes(states, lanes))
    return logits.sigmoid().clamp(min=LOWEST_LEVEL)


def _modulated(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(hidden, hidden.shape[-1:], eps=EPS), 1 + scale)


def _waves(level: Tensor) -> Tensor:
    """Sines and cosines [R, 2 FREQUENCIES] of noise levels [R], at 1 to 1000 radians per unit."""
    rates = torch.logspace(0, 3, FREQUENCIES, device=level.device, dtype=level.dtype)
    angles = level[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
