"""The tiny FLUX's AutoencoderKL: initialized to a PCA of 4 x 4 pixels, then trained.

The network reads space-to-depth pixels, 48 channels at a quarter of the resolution, and keeps that resolution, because
its own up- and downsampling cannot be initialized to a known solution. Its config has `SPACE_TO_DEPTH_KEY`.

It is initialized to a linear map: SiLU(a) - SiLU(-a) = a, so every component is passed twice with opposite signs. Two
large constant channels dominate the group norm's variance, which makes it nearly a fixed scale. The blocks add zero.
"""

from __future__ import annotations

import math
import time

import torch
from diffusers import AutoencoderKL
from flux_data import LATENT_CHANNELS, psnr, to_depth, to_pixels
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 3 * 4 * 4
SPACE_TO_DEPTH_KEY = "_bifrost_space_to_depth"  # diffusers keeps keys with an underscore without a warning
STEADY = 30.0
BATCH, LEARNING_RATE, NOISE = 32, 2e-3, 0.05


def build_vae(depth: Tensor) -> AutoencoderKL:
    """The initial autoencoder, fitted to [n, 48, 16, 16]. Draws from torch's global generator."""
    vae = AutoencoderKL(
        in_channels=WIDTH,
        out_channels=WIDTH,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(WIDTH,),
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=LATENT_CHANNELS,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=depth.shape[-1],
    )
    rows = depth.permute(0, 2, 3, 1).reshape(-1, WIDTH)
    mean = rows.mean(dim=0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    components, spread = vectors.T.flip(0)[:LATENT_CHANNELS], values.flip(0)[:LATENT_CHANNELS].sqrt()
    # Partially whitened, so that brightness does not dominate and small components are not pure noise.
    scale = spread.sqrt()[:, None]
    project, expand = components / scale, components * scale
    with torch.no_grad():
        for part in (vae.encoder, vae.decoder):
            for block in part.modules():
                if isinstance(block, nn.Conv2d):
                    nn.init.zeros_(block.bias)
            for name, parameter in part.named_parameters():
                if ".conv2." in name:
                    parameter.zero_()
            part.conv_norm_out.weight.fill_(STEADY * math.sqrt(2 / WIDTH))
        _linear(vae.encoder, project, -(project @ mean), torch.eye(LATENT_CHANNELS), torch.zeros(LATENT_CHANNELS))
        _linear(vae.decoder, torch.eye(LATENT_CHANNELS), torch.zeros(LATENT_CHANNELS), expand.T, mean)
        vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -8  # log variance
    return vae


def _linear(part: nn.Module, first: Tensor, first_bias: Tensor, last: Tensor, last_bias: Tensor) -> None:
    """Set an encoder or decoder to last @ (first @ x + first_bias) + last_bias at every position."""
    count = len(first)
    part.conv_in.weight.mul_(0.1)
    weight, bias = part.conv_in.weight, part.conv_in.bias
    weight[: 2 * count + 2].zero_()
    weight[:count, :, 1, 1], bias[:count] = first, first_bias
    weight[count : 2 * count, :, 1, 1], bias[count : 2 * count] = -first, -first_bias
    bias[2 * count], bias[2 * count + 1] = STEADY, -STEADY
    part.conv_out.weight.zero_()
    part.conv_out.weight[: len(last), :count, 1, 1] = last
    part.conv_out.weight[: len(last), count : 2 * count, 1, 1] = -last
    part.conv_out.bias[: len(last)] = last_bias


def train_vae(vae: AutoencoderKL, images: Tensor, steps: int, seed: int) -> None:
    """Train for `steps` steps on uint8 images [n, 3, 64, 64] and then set shift and scale."""
    draws = torch.Generator().manual_seed(seed)
    rule = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    started = time.monotonic()
    for step in range(steps):
        for group in rule.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * (1 - step / steps)
        chosen = images[torch.randint(len(images), (BATCH,), generator=draws)]
        depth = to_depth(chosen)
        z = vae.encode(depth).latent_dist.mean
        again = vae.decode(z + NOISE * torch.randn(z.shape, generator=draws)).sample
        loss = F.l1_loss(again, depth) + 2 * F.mse_loss(again, depth) + 1e-4 * z.square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        rule.step()
        rule.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"vae {step + 1:5d}  loss {loss.item():.4f}  {(time.monotonic() - started) / (step + 1):.3f} s/step")
    z = encode(vae, images, raw=True)
    vae.register_to_config(
        shift_factor=round(z.mean().item(), 4),
        scaling_factor=round(1 / z.std().item(), 4),
        **{SPACE_TO_DEPTH_KEY: 4},
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, raw: bool = False) -> Tensor:
    """Latents [n, 16, 16, 16] of uint8 images, shifted and scaled to a standard deviation of 1 unless `raw`."""
    z = torch.cat([vae.encode(to_depth(part)).latent_dist.mean for part in images.split(64)])
    return z if raw else (z - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """uint8 images from latents of `encode`."""
    z = latents / vae.config.scaling_factor + vae.config.shift_factor
    return torch.cat([to_pixels(vae.decode(part).sample) for part in z.split(64)])


def round_trip(vae: AutoencoderKL, images: Tensor) -> float:
    """PSNR in dB of encoding and decoding uint8 images."""
    return psnr(decode(vae, encode(vae, images)), images)
