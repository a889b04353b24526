"""Draw docs/scenes.png, and print the scorer's own figures as the table of data.md.

python docs/make_scenes.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from torch.nn import functional as F

from bifrost.data.scenes.grammar import CATEGORIES, Scene, render
from bifrost.data.scenes.heldout import heldout_scenes, training_scenes
from bifrost.data.scenes.scorer import read, score, summary
from bifrost.data.transforms import resized
from bifrost.recipes import FOLDER

ACROSS, GAP = 8, 4
Degrade = Callable[[np.ndarray], np.ndarray]


def to_bytes(values: np.ndarray) -> np.ndarray:
    return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)


def noise(deviation: float, images: np.ndarray) -> np.ndarray:
    draws = np.random.default_rng(0).standard_normal(images.shape, dtype=np.float32)
    return to_bytes(images / np.float32(255) + deviation * draws)


def blur(radius: float, images: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(each).filter(ImageFilter.GaussianBlur(radius))) for each in images])


def shift(down: int, right: int, images: np.ndarray) -> np.ndarray:
    room, size = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), constant_values=255), images.shape[1]
    return room[:, 4 - down : 4 - down + size, 4 - right : 4 - right + size]


def contrast(factor: float, images: np.ndarray) -> np.ndarray:
    return to_bytes(1 - (1 - images.astype(np.float32) / 255) * factor)


def small(images: np.ndarray) -> np.ndarray:
    return np.stack([np.ascontiguousarray(resized(each, 64)) for each in images])


def mixed_with_mean(images: np.ndarray) -> np.ndarray:
    return (images * 0.5 + images.mean(axis=0) * 0.5).astype(np.uint8)


@torch.no_grad()
def autoencoder(images: np.ndarray) -> np.ndarray:
    """To 64 px, through the VAE of `builtin:tiny-flux` and back."""
    vae = AutoencoderKL.from_pretrained(FOLDER / "foundations" / "tiny-flux" / "vae").eval()
    pixels = torch.from_numpy(small(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    depth = F.pixel_unshuffle(pixels, vae.config._bifrost_space_to_depth)
    decoded = F.pixel_shuffle(vae.decode(vae.encode(depth).latent_dist.mean).sample, vae.config._bifrost_space_to_depth)
    return to_bytes((decoded.permute(0, 2, 3, 1).numpy() + 1) / 2)


DEGRADED: dict[str, Degrade] = {
    "true renders": np.asarray,
    "64 px": small,
    "64 px, through the VAE of `builtin:tiny-flux`": autoencoder,
    "noise of standard deviation 0.2": partial(noise, 0.2),
    "noise of standard deviation 0.4": partial(noise, 0.4),
    "Gaussian blur, radius 2 px": partial(blur, 2),
    "Gaussian blur, radius 4 px": partial(blur, 4),
    "shifted by (1, -1) px": partial(shift, 1, -1),
    "shifted by (-2, 2) px": partial(shift, -2, 2),
    "shifted by (4, 4) px": partial(shift, 4, 4),
    "half the contrast": partial(contrast, 0.5),
    "darkened to 0.8": lambda images: (images * 0.8).astype(np.uint8),
    "half true, half the mean of all images": mixed_with_mean,
    "another scene's image": partial(np.roll, shift=1, axis=0),
}


def measured_scenes(each: int) -> list[Scene]:
    """`each` scenes of every held-out category and as many of the training split."""
    heldout = heldout_scenes(each, seed=1)
    return heldout + training_scenes(len(heldout), seed=3)


def figures(degrade: Degrade, scenes: list[Scene]) -> dict[str, float]:
    images = degrade(np.stack([render(scene) for scene in scenes]))
    return summary(map(score, read(images), scenes))


def sheet() -> Image.Image:
    """Training scenes, a row per category."""
    scenes = training_scenes(400, seed=0)
    side = 112 + GAP
    canvas = Image.new("RGB", (ACROSS * side - GAP, len(CATEGORIES) * side - GAP), "lightgrey")
    for row, category in enumerate(CATEGORIES):
        for column, scene in enumerate([each for each in scenes if each.category == category][:ACROSS]):
            canvas.paste(Image.fromarray(render(scene)), (column * side, row * side))
    return canvas


def main() -> None:
    sheet().quantize(128).save(Path(__file__).with_name("scenes.png"), optimize=True)
    scenes = measured_scenes(40)
    print(f"{len(scenes)} scenes\n\n| image | all | set | layout | objects |\n|---|---|---|---|---|")
    for name, degrade in DEGRADED.items():
        found = figures(degrade, scenes)
        print(f"| {name} | " + " | ".join(f"{found[key]:.3f}" for key in ("all", "set", "layout", "objects")) + " |")


if __name__ == "__main__":
    main()
