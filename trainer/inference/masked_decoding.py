"""Masked decoding: from prompts to patch latents, in any number of steps.

Each step predicts all patches that are still masked and keeps the predictions of a few, which are never revised. A
linear head's latents are the mean that it regresses, and only the order is random; a flow head's are samples.

Legend: B samples, N patches, D latent width, k patches revealed in a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...kernels import PatchLatentHead
from ..errors import RunError
from ..models.backbone import Prefix
from ..models.branch import GenerationBranch
from ..models.flow_head import FlowHead, draw_noise, guided
from ..models.image_grids import Grid
from ..models.rng import IntArray, Stream, states, uniform

Schedule = Literal["cosine", "linear"]

NO_EPOCH = -1
"""The epoch of draws for generation, so that none coincides with a training draw."""


def reveal_counts(tokens: int, steps: int, schedule: Schedule = "cosine") -> list[int]:
    """Patches revealed per step: at least one in each of `steps` steps, `tokens` in total.

    cosine: tokens * cos(pi/2 * (s + 1) / steps), rounded down, stay masked after step s (LTH14/mar, `models/mar.py`).
    """
    if not 1 <= steps <= tokens:
        raise RunError(f"{steps} decoding steps for {tokens} patches: set 1 to {tokens}")
    counts, hidden = [], tokens
    for left in range(steps - 1, -1, -1):
        if schedule == "linear":
            goal = tokens * left // steps
        else:
            goal = math.floor(tokens * math.cos(math.pi / 2 * (steps - left) / steps))
        remaining = max(left, min(hidden - 1, goal))
        counts.append(hidden - remaining)
        hidden = remaining
    return counts


def draw_orders(seeds: Sequence[int], tokens: int) -> Tensor:
    """The order in which patches are revealed, int64 [B, tokens], per image a function of its seed only."""
    draws = uniform(0, Stream.MASK_ORDER, *_generation(seeds), tokens)
    return torch.from_numpy(draws.argsort(axis=1))


def draw_latent_noise(
    head: PatchLatentHead | FlowHead, seeds: Sequence[int], tokens: int, temperature: float = 1.0
) -> Tensor | None:
    """The noise from which a flow head samples, fp32 [B, tokens, D], per image a function of its seed only; None for a
    linear head, for which RunError refuses any other temperature than 1. temperature: the noise's deviation."""
    if not isinstance(head, FlowHead):
        if temperature != 1:
            raise RunError(f"temperature {temperature:g}: this model's head is linear, it samples nothing; leave it 1")
        return None
    device, width = head.mean.device, len(head.mean)
    own = torch.from_numpy(states(0, Stream.LATENT_NOISE, *_generation(seeds)).view(np.int64)).to(device)
    lanes = torch.arange(tokens, device=device).repeat(len(own))
    return temperature * draw_noise(own.repeat_interleave(tokens), lanes, width).view(len(own), tokens, width)


def _generation(seeds: Sequence[int]) -> tuple[IntArray, IntArray]:
    """Epoch and index of the draws of images."""
    index = np.array(seeds, dtype=np.int64)
    return np.full_like(index, NO_EPOCH), index


@torch.no_grad()
def predict(head: PatchLatentHead | FlowHead, hidden: Tensor, noise: Tensor | None, guidance: float = 1.0) -> Tensor:
    """Latents [R, D] in fp32 of R patches from hidden states [C, R, D], the unconditional ones last if C is 2; a flow
    head's from noise [R, D]."""
    if isinstance(head, FlowHead):
        assert noise is not None
        return head.sample(hidden, noise, guidance)
    return guided(head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]), guidance)


@torch.no_grad()
def decode(
    branch: GenerationBranch,
    head: PatchLatentHead | FlowHead,
    prefix: Prefix,
    orders: Tensor,
    counts: Sequence[int],
    guidance: float = 1.0,
    noise: Tensor | None = None,
    grid: Grid | None = None,
) -> Tensor:
    """Patch latents [B, N, D] of the prompts in `prefix`, revealed in `orders` [B, N], `counts` of them per step.

    guidance: w of uncond + w (cond - uncond). Unless it is 1, `prefix` contains 2 B prompts, the B unconditional ones
    last, and each step is one forward pass of 2 B samples. noise [B, N, D]: of a flow head. grid: rows and columns of
    the N patches; None: the square.
    """
    samples, tokens = orders.shape
    copies = 1 if guidance == 1 else 2
    assert len(prefix.layout.text.lengths) == copies * samples, "one prefix for every row"
    latents = branch.mask_token.new_zeros(samples, tokens, branch.config.hidden_size)
    begin = torch.arange(copies * samples, device=orders.device)[:, None] * tokens
    places = orders.argsort(dim=1)
    revealed = 0
    for count in counts:
        chosen = orders[:, revealed : revealed + count]
        rows = (begin + chosen.repeat(copies, 1)).flatten()
        mask = (places >= revealed).repeat(copies, 1)
        hidden = branch(latents.repeat(copies, 1, 1), mask, prefix, rows, grid)
        channels = chosen[..., None].expand(-1, -1, latents.shape[-1])
        own = None if noise is None else noise.gather(1, channels).flatten(0, 1)
        found = predict(head, hidden.unflatten(0, (copies, -1)), own, guidance)
        latents.scatter_(1, channels, found.unflatten(0, (samples, count)).to(latents.dtype))
        revealed += count
    return latents
