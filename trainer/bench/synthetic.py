"""Random micro-batches with the shapes of a recipe's own, as its collate function would give them.

Legend: B samples, K draws per sample, N patch latents of width D, T text tokens, S and P image sides in pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.backbone_config import grid_side
from ..models.masking import draw_masks, hidden_counts
from ..stages.controlnet import ControlNetStage
from ..stages.patch_latents import PatchLatentStage

TEXT_TOKENS = 80
"""Tokens of a stage-1 prompt, as `bifrost plan` counts them by default."""


class _Draws:
    """Random tensors in host memory, a function of `seed`."""

    def __init__(self, seed: int, samples: int, dtype: torch.dtype) -> None:
        """samples: B, the first size of every tensor. dtype: of a cache's tensors."""
        self.generator = torch.Generator().manual_seed(seed)
        self.samples, self.dtype = samples, dtype

    def pixels(self, side: int) -> Tensor:
        return self.integers(256, 3, side, side).to(torch.uint8)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, (self.samples, *shape), generator=self.generator)

    def normal(self, *shape: int, repeat: int = 1) -> Tensor:
        return torch.randn(self.samples * repeat, *shape, generator=self.generator)

    def cached(self, *shape: int) -> Tensor:
        return self.normal(*shape).to(self.dtype)


def text_tokens(stage: PatchLatentStage | ControlNetStage) -> int:
    """Tokens of every prompt: T."""
    if isinstance(stage, ControlNetStage):
        return stage.folder.text_lengths[0]
    return min(TEXT_TOKENS, stage.branch.max_text_tokens)


def micro_batch(stage: PatchLatentStage | ControlNetStage, samples: int, first: int) -> dict[str, Any]:
    """The arguments of the stage's model, without `normalizer`, for `samples` samples from number `first` on."""
    draws = _Draws(first, samples, torch.float32 if stage.precision == "fp32" else torch.bfloat16)
    if isinstance(stage, ControlNetStage):
        return _controlnet(stage, draws)
    return _patch_latents(stage, draws, np.arange(first, first + samples))


def _patch_latents(stage: PatchLatentStage, draws: _Draws, index: Any) -> dict[str, Any]:
    tokens, epoch, text = stage.tokens_per_image, np.zeros_like(index), text_tokens(stage)
    counts = hidden_counts(stage.branch.mask_rate, stage.seed, epoch, index, tokens, stage.branch.draws)
    mask = draw_masks(stage.seed, epoch, index, counts, tokens)
    width = stage.config.text_config.hidden_size
    cached = stage.backbone.vision_encoder == "cached"
    images = {"latents": draws.cached(tokens, width)} if cached else {"images": draws.pixels(stage.image_size)}
    found = {
        **images,
        "input_ids": draws.integers(stage.config.text_config.vocab_size, text).flatten(),
        "text_lengths": (text,) * len(index),
        "mask": torch.from_numpy(mask),
        "masked": torch.from_numpy(np.flatnonzero(mask)),
    }
    if stage.branch.head == "flow":
        found["noise"] = draws.integers(2**62, 2)
    return found


def _controlnet(stage: ControlNetStage, draws: _Draws) -> dict[str, Any]:
    transformer, cached = stage.folder.transformer, stage.flux.placement.cached
    channels, height, width = stage.latents
    repeat = stage.flux.draws
    found: dict[str, Any] = {
        "posterior": draws.normal(channels, height, width, repeat=repeat),
        "noise": draws.normal(height * width // 4, 4 * channels, repeat=repeat),
        "level": draws.normal(repeat=repeat),
    }
    if "vision" in cached:
        patches = grid_side(stage.config, stage.data.image_size) ** 2
        found["latents"] = draws.cached(patches, stage.shape.latent_width)
    else:
        found["images"] = draws.pixels(stage.data.image_size)
    if "vae" in cached:
        found |= {"mean": draws.cached(channels, height, width), "std": draws.cached(channels, height, width).exp()}
    else:
        found["flux_images"] = draws.pixels(stage.flux.image_size)
    t5, clip = stage.folder.text_lengths
    if "text" in cached:
        found["text"] = draws.cached(t5, transformer["joint_attention_dim"])
        found["pooled"] = draws.cached(transformer["pooled_projection_dim"])
    else:
        found["t5"] = draws.integers(stage.folder.t5.vocab_size, t5)
        found["clip"] = draws.integers(stage.folder.clip.vocab_size, clip)
    return found
