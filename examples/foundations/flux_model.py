"""The tiny FLUX transformer: architecture, initial weights, velocity, sampling.

Legend: B samples of 64 packed tokens x 64 channels, T text tokens.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from flux_data import CHANNELS, TOKENS, image_ids
from flux_text import CLIP_WIDTH, T5_WIDTH
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, HEAD_WIDTH = 3, 64
DOUBLE, SINGLE = 2, 4
NOISE_SHIFT = 3.0


class Text(NamedTuple):
    """FLUX's text conditioning: CLIP's pooled state [B, CLIP_WIDTH] and T5's token states [B, T, T5_WIDTH]."""

    pooled: Tensor
    states: Tensor

    def rows(self, index: Tensor) -> Text:
        return Text(self.pooled[index], self.states[index])


def build_transformer() -> FluxTransformer2DModel:
    """5.2 million parameters from torch's global generator; blocks are initialized to identity, the output to zero."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if "norm" in name or name == "proj_out" or name.endswith("guidance_embedder.linear_2"):
                nn.init.zeros_(module.weight)
    return model


def velocity(model: nn.Module, noisy: Tensor, sigma: Tensor, text: Text, guidance: Tensor) -> Tensor:
    """The predicted velocity (noise - drawing) [B, 64, 64] at noise levels sigma [B] with guidance [B]."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        return model(
            hidden_states=noisy,
            encoder_hidden_states=text.states.to(noisy.dtype),
            pooled_projections=text.pooled.to(noisy.dtype),
            timestep=sigma,
            guidance=guidance,
            img_ids=image_ids(),
            txt_ids=torch.zeros(text.states.shape[1], 3),
            return_dict=False,
        )[0].float()


def shifted(sigma: Tensor) -> Tensor:
    """Noise levels moved towards 1, as for images of high resolution: where the objects are is decided above 0.85."""
    return NOISE_SHIFT * sigma / (1 + (NOISE_SHIFT - 1) * sigma)


def noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(
    model: nn.Module,
    text: Text,
    empty: Text,
    *,
    steps: int = 20,
    cfg: float = 1.0,
    guidance: float = 1.0,
    seed: int = 1,
) -> Tensor:
    """Packed latents [B, 64, 64] by `steps` Euler steps; `cfg` above 1 is true classifier-free guidance."""
    count = len(text.pooled)
    x = noise(count, seed)
    sigmas = shifted(torch.linspace(1, 0, steps + 1))
    nothing = Text(empty.pooled.expand(count, -1), empty.states.expand(count, -1, -1))
    strength = torch.full((count,), guidance)
    for now, then in pairwise(sigmas):
        v = velocity(model, x, now.expand(count), text, strength)
        if cfg != 1:
            free = velocity(model, x, now.expand(count), nothing, torch.ones(count))
            v = free + cfg * (v - free)
        x = x + (then - now) * v
    return x
