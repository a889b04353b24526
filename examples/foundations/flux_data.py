"""The demo's drawings for the tiny FLUX, and the geometry between pixels and FLUX's tokens.

Legend: n drawings of 3 x 64 x 64 pixels, 48 x 16 x 16 after space-to-depth; latents 16 x 16 x 16, packed 64 x 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor
from torch.nn import functional as F

from bifrost.data import Loader, LoaderSettings, Plan, Share, open_dataset

IMAGE_SIZE = 64
DEPTH = 4
"""Side in pixels of the squares that become channels before the VAE."""
LATENT_SIDE, LATENT_CHANNELS = IMAGE_SIZE // DEPTH, 16
SIDE, TOKENS, CHANNELS = LATENT_SIDE // 2, LATENT_SIDE**2 // 4, 4 * LATENT_CHANNELS
CELLS = 4
"""Cells per side that a drawing's text tokens describe; the tiny Qwen2.5-VL has the same number of patch latents."""
PREFIXES = (
    *("a", "an", "the", "one", "some", "draw", "paint", "show me", "an icon of", "a small", "a sketch of"),
    *("a drawing of", "a drawing of a", "an image of", "an image of a", "a picture of", "a picture of a"),
    *("an emoji of", "an emoji of a", "a cartoon of", "Generate an image of", "Generate an image of a"),
)
SUFFIXES = ("emoji", "icon", "drawing", "on white", "on a white background", "in flat colors", ", simple", ".")
UNSEEN_PHRASE = "please make a picture with {}"


class Drawings(NamedTuple):
    """A split of the demo dataset: images uint8 [n, 3, 64, 64] and captions, shuffled by the seed."""

    images: Tensor
    captions: list[str]


def read_drawings(shards: str, seed: int) -> Drawings:
    """All drawings of `shards`, decoded once."""
    dataset = open_dataset(shards)
    captions: list[str] = []

    def collate(items: list) -> dict[str, Tensor]:
        captions.extend(item.caption for item in items)
        return {"images": torch.from_numpy(np.stack([item.image for item in items])).permute(0, 3, 1, 2)}

    plan = Plan(dataset.samples_per_shard, seed)
    loader = Loader(
        dataset,
        plan,
        collate,
        Share(0, 1, 1, 1),
        range(len(plan)),
        LoaderSettings((IMAGE_SIZE,)),
    )
    images = torch.cat([batch.arrays["images"] for batch in loader]).contiguous()
    return Drawings(images, captions)


def phrased(captions: Sequence[str], draws: torch.Generator) -> list[str]:
    """The captions in varied phrasings; half of them unchanged."""
    texts = []
    for caption, bare, before, after, where in zip(
        captions, *torch.rand(4, len(captions), generator=draws).tolist(), strict=True
    ):
        prefix = PREFIXES[int(before * len(PREFIXES))] + " " if where < 0.75 else ""
        suffix = SUFFIXES[int(after * len(SUFFIXES))] if where > 0.5 else ""
        join = "" if suffix.startswith((",", ".")) else " "
        texts.append(caption if bare < 0.5 else f"{prefix}{caption}{join if suffix else ''}{suffix}")
    return texts


def to_depth(images: Tensor) -> Tensor:
    """uint8 [n, 3, 64, 64] -> -1 .. 1, [n, 48, 16, 16]."""
    return F.pixel_unshuffle(images.float().div(127.5).sub(1), DEPTH)


def to_pixels(depth: Tensor) -> Tensor:
    """[n, 48, 16, 16] -> uint8 [n, 3, 64, 64]."""
    pixels = F.pixel_shuffle(depth.float(), DEPTH)
    return pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def pack(latents: Tensor) -> Tensor:
    """[n, 16, 16, 16] -> [n, 64, 64], FLUX's tokens of 2 x 2 latents."""
    return FluxPipeline._pack_latents(latents, len(latents), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)


def unpack(tokens: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return FluxPipeline._unpack_latents(tokens, LATENT_SIDE, LATENT_SIDE, 1)


def cells(tokens: Tensor) -> Tensor:
    """Packed latents [n, 64, 64] by cell of 2 x 2 tokens: [n, CELLS^2, 256]."""
    side = SIDE // CELLS
    grid = tokens.view(len(tokens), CELLS, side, CELLS, side, CHANNELS)
    return grid.transpose(2, 3).reshape(len(tokens), CELLS * CELLS, -1)


def image_ids() -> Tensor:
    """FLUX's positions of the 64 tokens, [64, 3]."""
    return FluxPipeline._prepare_latent_image_ids(1, SIDE, SIDE, "cpu", torch.float32)


def psnr(images: Tensor, others: Tensor) -> float:
    """PSNR in dB between uint8 images, from the mean squared error over all of them."""
    error = (images.float() - others.float()).square().mean()
    return 10 * (255**2 / error).log10().item()
