"""Masked decoding: from prompts to patch latents, in any number of steps.

Each step predicts all patches that are still masked and keeps the predictions of a few, which are never revised. The
latents are the mean that the branch regresses; only the order is random.

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
from ..models.rng import Stream, uniform

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
    index = np.array(seeds, dtype=np.int64)
    draws = uniform(0, Stream.MASK_ORDER, np.full_like(index, NO_EPOCH), index, tokens)
    return torch.from_numpy(draws.argsort(axis=1))


@torch.no_grad()
def decode(
    branch: GenerationBranch,
    head: PatchLatentHead,
    prefix: Prefix,
    orders: Tensor,
    steps: int = 16,
    schedule: Schedule = "cosine",
    guidance: float = 1.0,
) -> Tensor:
    """Patch latents [B, N, D] of the prompts in `prefix`, revealed in `orders` [B, N].

    guidance: w of uncond + w (cond - uncond). Unless it is 1, `prefix` contains 2 B prompts, the B unconditional ones
    last, and each step is one forward pass of 2 B samples.
    """
    samples, tokens = orders.shape
    copies = 1 if guidance == 1 else 2
    assert len(prefix.layout.text.lengths) == copies * samples, "one prefix for every row"
    latents = head.weight.new_zeros(samples, tokens, head.out_features)
    begin = torch.arange(copies * samples, device=orders.device)[:, None] * tokens
    places = orders.argsort(dim=1)
    revealed = 0
    for count in reveal_counts(tokens, steps, schedule):
        chosen = orders[:, revealed : revealed + count]
        rows = (begin + chosen.repeat(copies, 1)).flatten()
        mask = (places >= revealed).repeat(copies, 1)
        hidden = branch(latents.repeat(copies, 1, 1), mask, prefix, rows)
        found = head(hidden).unflatten(0, (copies, samples, count))
        if copies == 2:
            conditional, unconditional = found.float()
            found = (unconditional + guidance * (conditional - unconditional))[None]
        latents.scatter_(1, chosen[..., None].expand(-1, -1, latents.shape[-1]), found[0].to(latents.dtype))
        revealed += count
    return latents
