"""Measures of how well the tiny FLUX follows its text, by reading its images back, and a contact sheet.

Legend: n scenes of 3 x 64 x 64 pixels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from flux_data import LATENT_SIDE, listed, to_images, unpack
from flux_model import sample
from flux_vae import decode, round_trip
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bifrost.data.scenes.grammar import Scene
from bifrost.data.scenes.heldout import heldout_scenes, training_scenes
from bifrost.data.scenes.scorer import score_images

if TYPE_CHECKING:
    from flux_training import Pool, Training

CATEGORIES = ("single", "colour", "count", "two", "binding", "position")


def probed(each: int, seed: int = 0) -> list[Scene]:
    """`each` training scenes of every category, with distinct captions."""
    by_caption = {scene.caption: scene for scene in training_scenes(2000, seed)}
    scenes = list(by_caption.values())
    return [scene for name in CATEGORIES for scene in [s for s in scenes if s.category == name][:each]]


def measures(images: Tensor, scenes: list[Scene]) -> dict[str, dict[str, float]]:
    """`score_images` of uint8 images [n, 3, 64, 64], rounded."""
    scores = score_images(images.permute(0, 2, 3, 1).numpy(), scenes)
    return {name: {key: round(value, 3) for key, value in values.items()} for name, values in scores.items()}


class Probe:
    """Generates images of a few training scenes from FLUX's own captions alone, scores them and draws a sheet."""

    def __init__(self, work: Path, vae: AutoencoderKL, pool: Pool, **options: float) -> None:
        from flux_training import encode_texts

        self.work, self.vae, self.empty, self.options = work, vae, pool.empty, options
        self.scenes = probed(16)
        draws = np.random.default_rng(0)
        self.captions = [listed(scene, draws)[0] for scene in self.scenes]
        self.text = encode_texts(pool.encoders, self.captions)

    def __call__(self, training: Training) -> None:
        tokens = sample(training.average, self.text, self.empty, **self.options)  # type: ignore[arg-type]
        images = decode(self.vae, unpack(tokens))
        print(json.dumps({"step": training.step, **measures(images, self.scenes)}), flush=True)
        sheet(self.work / "sheet.png", self.captions, images, to_images(self.scenes))


def report(out: Path) -> None:
    """Print measures of the shipped folder through `FluxPipeline`: 20 steps."""
    pipeline = FluxPipeline.from_pretrained(out, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    seen, heldout = probed(40), heldout_scenes(25, 0)
    print(f"round trip: held out {round_trip(pipeline.vae, to_images(heldout)):.2f} dB")
    draws = np.random.default_rng(0)
    rows = [
        ("FLUX's own", seen, [listed(scene, draws)[0] for scene in seen], 3.5),
        ("FLUX's own", seen, [listed(scene, draws)[0] for scene in seen], 1.0),
        ("of the scene", seen, [scene.caption for scene in seen], 3.5),
        ("of the scene", heldout, [scene.caption for scene in heldout], 3.5),
        ("empty", seen, [""] * len(seen), 3.5),
    ]
    for name, scenes, texts, guidance in rows:
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            tokens = pipeline(
                texts,
                height=LATENT_SIDE,
                width=LATENT_SIDE,
                num_inference_steps=20,
                guidance_scale=guidance,
                max_sequence_length=pipeline.tokenizer_2.model_max_length,
                generator=torch.Generator().manual_seed(1),
                output_type="latent",
            ).images
        found = decode(pipeline.vae, unpack(tokens.float()))
        print(json.dumps({"captions": name, "guidance": guidance, **measures(found, scenes)}), flush=True)


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
