"""A recipe's stage, model and batch on the phantom device, as a run has them, but without weights and files."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...recipes import Recipe
from ..models.image_grids import patch_grid
from ..models.kernel_selection import KernelChoice
from ..models.masking import hidden_counts
from ..stages import open_controlnet, open_patch_latents
from ..stages.controlnet import ControlNetStage
from ..stages.patch_latents import PatchLatentStage

DEVICE = torch.device("cuda", 0)
KERNELS = KernelChoice("triton-tma", "varlen", "varlen")
"""What a run on an H100 or later chooses."""
AnyStage = PatchLatentStage | ControlNetStage


def open_placed(recipe: Recipe, placed: bool) -> AnyStage:
    """The recipe's stage. placed: with its parts placed as in the recipe, else all of them in the model. RunError names
    what of its folders cannot be used."""
    stage: AnyStage
    if recipe.stage == "patch-latents":
        stage = open_patch_latents(recipe, for_counting=True)
    else:
        stage = open_controlnet(recipe, for_counting=True)
        stage.shape.require_use(stage.folder.transformer)
    return replace(stage, kernels=KERNELS, for_counting=not placed)  # pyright: ignore[reportCallIssue]


def dtype_of(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def random_batch(stage: AnyStage, samples: int, text_tokens: int) -> dict[str, Any]:
    """Arguments of the stage's model for a micro-batch, on the device. text_tokens: of every prompt of stage 1."""
    if isinstance(stage, PatchLatentStage):
        return _patch_latents(stage, samples, text_tokens)
    return _controlnet(stage, samples)


def _patch_latents(stage: PatchLatentStage, samples: int, text_tokens: int) -> dict[str, Any]:
    grid, pixels = stage.largest
    rows, patches, branch = samples * stage.branch.draws, math.prod(grid), stage.branch
    length = text_tokens + (patches if stage.edits else 0)  # every sample is an editing pair if some are
    index = np.arange(4096)  # the mean of many samples: that of a micro-batch differs from run to run
    counts = hidden_counts(branch.mask_rate, stage.seed, np.zeros_like(index), index, patches)
    found: dict[str, Any] = {
        "input_ids": empty(samples * length, dtype=torch.int64),
        "text_lengths": (length,) * samples,
        "mask": empty(rows, patches, dtype=torch.bool),
        "masked": empty(round(rows * float(counts.mean())), dtype=torch.int64),
        "normalizer": float(rows * patches),
        "grid": grid,
    }
    if branch.head == "flow":
        found["noise"] = empty(samples, 2, dtype=torch.int64)
    if stage.backbone.vision_encoder == "cached":
        width = stage.config.text_config.hidden_size
        return {**found, "latents": empty(samples, patches, width, dtype=dtype_of(stage.precision))}
    if stage.edits:
        sources = empty(samples, 3, *pixels, dtype=torch.uint8)
        found |= {"sources": sources, "source_begins": (text_tokens // 2,) * samples}
    return {**found, "images": empty(samples, 3, *pixels, dtype=torch.uint8)}


def _controlnet(stage: ControlNetStage, samples: int) -> dict[str, Any]:
    (channels, height, width), seen, made = stage.largest
    dtype, folder, cached = dtype_of(stage.precision), stage.folder, stage.flux.placement.cached
    rows = samples * stage.flux.draws
    t5, clip = folder.text_lengths
    found: dict[str, Any] = {
        "posterior": empty(rows, channels, height, width),
        "noise": empty(rows, height * width // 4, 4 * channels),
        "level": empty(rows),
        "normalizer": float(rows * channels * height * width),
    }
    if "vision" in cached:
        patches = math.prod(patch_grid(seen, stage.data.image_size, stage.square.latents[0]))
        found["latents"] = empty(samples, patches, stage.condition[1], dtype=dtype)
    else:
        found["images"] = empty(samples, 3, *seen, dtype=torch.uint8)
    if "vae" in cached:
        found |= {name: empty(samples, channels, height, width, dtype=dtype) for name in ("mean", "std")}
    else:
        found["flux_images"] = empty(samples, 3, *made, dtype=torch.uint8)
    if "text" in cached:
        found["text"] = empty(samples, t5, folder.t5.d_model, dtype=dtype)
        found["pooled"] = empty(samples, folder.clip.hidden_size, dtype=dtype)
    else:
        found["t5"], found["clip"] = (empty(samples, length, dtype=torch.int64) for length in (t5, clip))
    return found


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the device."""
    return torch.empty(shape, dtype=dtype, device=DEVICE)
