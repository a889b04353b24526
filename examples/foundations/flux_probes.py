"""Measures of how well the tiny FLUX follows its text: retrieval among real drawings, and a contact sheet.

Legend: n drawings of 3 x 64 x 64 pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from flux_data import psnr
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from bifrost.recipes import FOLDER
from bifrost.trainer.models.backbone import pixel_patches

TOWER_SIZE, PATCH, MERGE, TEMPORAL = 112, 14, 2, 2


def load_tower() -> Qwen2_5_VLForConditionalGeneration:
    """`builtin:tiny`, in fp32."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        FOLDER / "foundations" / "tiny", dtype=torch.float32
    ).eval()


def recall(found: Tensor, real: Tensor) -> float:
    """Fraction of rows of `found` [n, ...] whose nearest row of `real` [m, ...] has the same index."""
    distance = torch.cdist(found.flatten(1).float(), real.flatten(1).float())
    return (distance.argmin(dim=1) == torch.arange(len(found))).float().mean().item()


@torch.no_grad()
def tower_view(tower: Qwen2_5_VLForConditionalGeneration, images: Tensor) -> Tensor:
    """Patch latents of uint8 images [n, 3, 64, 64]."""
    size = (TOWER_SIZE, TOWER_SIZE)
    large = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True)
    large = large.clamp(0, 255).round().to(torch.uint8)
    side = TOWER_SIZE // PATCH
    parts = []
    for part in large.split(64):
        grid = torch.tensor([[1, side, side]]).expand(len(part), 3)
        patches = pixel_patches(part, PATCH, TEMPORAL, MERGE)
        parts.append(tower.model.visual(patches, grid_thw=grid).pooler_output.view(len(part), -1))
    return torch.cat(parts)


def measures(tower: Qwen2_5_VLForConditionalGeneration, found: Tensor, real: Tensor) -> dict[str, float]:
    """Measures of generated uint8 images [n, 3, 64, 64] against real ones, of which the first n correspond to them."""
    seen, among = tower_view(tower, found), tower_view(tower, real)
    n = len(found)
    return {
        "psnr": round(psnr(found, real[:n]), 2),
        "pixel_r1": round(recall(found, real[:n]), 4),
        "tower_r1": round(recall(seen, among[:n]), 4),
        "pixel_r1_all": round(recall(found, real), 4),
        "tower_r1_all": round(recall(seen, among), 4),
    }


def sheet(path: Path, captions: list[str], *rows: Tensor, across: int = 16) -> None:
    """Save a contact sheet of the captions, each above its uint8 images [3, 64, 64] from every row."""
    side, title = rows[0].shape[-1], 12
    block = title + side * len(rows) + 4
    canvas = Image.new("RGB", (across * (side + 4), -(-len(captions) // across) * block), "white")
    pen = ImageDraw.Draw(canvas)
    for number, caption in enumerate(captions):
        left, top = number % across * (side + 4), number // across * block
        pen.text((left, top), caption[:11], fill="black")
        for place, row in enumerate(rows):
            pixels = np.ascontiguousarray(row[number].permute(1, 2, 0).numpy())
            canvas.paste(Image.fromarray(pixels), (left, top + title + place * side))
    canvas.save(path)
