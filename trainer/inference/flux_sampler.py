"""Sampling images from noise with the frozen FLUX: Euler steps along its velocity, corrected by the latent ControlNet.

Legend: B samples, N patch latents of width D, M packed FLUX tokens of C channels, L text tokens of width E, P pooled
text width, S image side in pixels.
"""

from __future__ import annotations

from ..models import libraries  # noqa: F401  # isort: skip

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..models.draws import gaussian
from ..models.flux import FluxFolder, FrozenFlux, image_ids, unpack, velocity
from ..models.rng import Stream, uniform
from ..models.text_bridge import Bridge, TextBridge
from .masked_decoding import NO_EPOCH
from .settings import Sampling

OnStep = Callable[[int, float, Tensor], Tensor | None]
"""Called after each step with its number, its noise level and the latents [B, M, C]; returns the latents to continue
with, or None to end the sampling with these."""


class Text(NamedTuple):
    """FLUX's text conditioning: T5 states [B, L, E] and CLIP pooled state [B, P]."""

    states: Tensor
    pooled: Tensor


def draw_noise(seeds: Sequence[int], tokens: int, channels: int) -> Tensor:
    """Standard normal noise [B, tokens, channels], fp32, per image a function of its seed only."""
    index = np.array(seeds, dtype=np.int64)
    draws = uniform(0, Stream.NOISE, np.full_like(index, NO_EPOCH), index, tokens * channels)
    return gaussian(torch.from_numpy(draws)).view(len(index), tokens, channels)


def noise_levels(folder: FluxFolder, tokens: int, steps: int) -> list[float]:
    """Noise levels from 1 to 0, [steps + 1], as in diffusers' FluxPipeline for `tokens` packed tokens.

    If the folder's scheduler shifts dynamically, the shift grows linearly with the number of tokens.
    """
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(folder.path / "scheduler")
    known = scheduler.config
    slope = (known.max_shift - known.base_shift) / (known.max_image_seq_len - known.base_image_seq_len)
    shift = known.base_shift + slope * (tokens - known.base_image_seq_len)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=shift)
    return scheduler.sigmas.tolist()


@torch.no_grad()
def sample(
    flux: FrozenFlux,
    text: Text,
    noise: Tensor,
    settings: Sampling = Sampling(),
    controlnet: Bridge | None = None,
    patch_latents: Tensor | None = None,
    empty: Text | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Latents [B, c, h, w], fp32, for `flux.decode_latents`, from noise of the grid of FLUX's tokens, [B, h / 2, w / 2,
    C], or [B, M, C] of a square.

    patch_latents [B, N, D] condition the ControlNet, or other bridge; without it, FLUX is conditioned on text only.
    empty: the empty prompt, [1, L, E] and [1, P], required for `cfg` other than 1; both prompts form one batch with the
    same ControlNet.
    """
    assert (controlnet is None) == (patch_latents is None)
    side = math.isqrt(noise.shape[1])
    rows, columns = noise.shape[1:3] if noise.ndim == 4 else (side, side)
    samples, tokens, device = len(noise), rows * columns, noise.device
    copies = 1 if settings.cfg == 1 else 2
    states, pooled = text
    if copies == 2:
        assert empty is not None
        states = torch.cat((states, empty.states.expand_as(states)))
        pooled = torch.cat((pooled, empty.pooled.expand_as(pooled)))
    rest: dict[str, Any] = {
        "text": states,
        "pooled": pooled,
        "guidance": flux.guidance(settings.guidance, copies * samples, device),
        "img_ids": image_ids(2 * rows, 2 * columns, device),
        "txt_ids": torch.zeros(states.shape[1], 3, device=device),
    }
    if patch_latents is not None:
        patch_latents = patch_latents.repeat(copies, 1, 1)
    if isinstance(controlnet, TextBridge):  # its tokens are the same at every noise level
        rest = controlnet.join(rest, patch_latents)  # type: ignore[arg-type]
        controlnet = None
    x = noise.reshape(samples, tokens, -1).float()
    for step, (now, then) in enumerate(pairwise(noise_levels(flux.folder, tokens, settings.steps))):
        rest["timestep"] = torch.full((copies * samples,), now, device=device)
        noisy, residuals = x.repeat(copies, 1, 1), None
        if controlnet is not None:
            residuals = controlnet(noisy, patch_latents, **rest, scale=settings.conditioning_scale, columns=columns)
        v = velocity(flux.transformer, noisy, residuals, **rest)
        if copies == 2:
            conditional, unconditional = v.chunk(2)
            v = unconditional + settings.cfg * (conditional - unconditional)
        x = x + (then - now) * v
        if on_step is not None:
            if (given := on_step(step, now, x)) is None:
                break
            x = given
    return unpack(x, 2 * rows, 2 * columns)
