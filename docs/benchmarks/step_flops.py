"""FLOPs of a step per mask (stage 1) or noise level (stage 2), counted by torch's FlopCounterMode at the models' full
size on the meta device.

`python docs/benchmarks/step_flops.py` prints the tables in docs/benchmarks/step.md: forward and backward of two
samples, in stage 1 of 80 text tokens, without activation checkpointing, which the counter includes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bifrost.recipes import Recipe, load_recipe
from bifrost.trainer.planner import parts
from bifrost.trainer.planner.timing import useful_flops
from bifrost.trainer.stages import open_controlnet, open_patch_latents

SAMPLES, TEXT = 2, 80
CACHED = "flux.placement={vae: cached, text: cached, vision_encoder: cached}"


def flops_per_mask(name: str, draws: int, cached: bool) -> tuple[float, float]:
    """FLOPs of a mask: counted by torch, and as `bifrost plan` counts them."""
    settings = ["activation_checkpointing=false", f"branch.draws={draws}"]
    recipe = load_recipe(name, [*settings, *(["backbone.vision_encoder=cached"] if cached else [])])
    stage = open_patch_latents(recipe, for_counting=True)
    size, patches, width = recipe.data.image_size, stage.tokens_per_image, stage.config.text_config.hidden_size
    with torch.device("meta"):
        latents = torch.empty(SAMPLES, patches, width)
        inputs: dict[str, Any] = {
            "input_ids": torch.empty(SAMPLES * TEXT, dtype=torch.int64),
            "mask": torch.empty(SAMPLES * draws, patches, dtype=torch.bool),
            "masked": torch.empty(SAMPLES * draws * patches, dtype=torch.int64),
            "images": torch.empty(SAMPLES, 3, size, size, dtype=torch.uint8),
        }
    inputs |= {"images": None, "latents": latents} if cached else {}
    return _counted(recipe, stage, {**inputs, "text_lengths": (TEXT,) * SAMPLES}, draws)


def flops_per_level(name: str, draws: int, cached: bool) -> tuple[float, float]:
    """FLOPs of a noise level: counted by torch, and as `bifrost plan` counts them. cached: all encoders' outputs."""
    settings = ["activation_checkpointing=false", f"flux.draws={draws}"]
    recipe = load_recipe(name, [*settings, *([CACHED] if cached else [])])
    stage = open_controlnet(recipe, for_counting=True)
    (channels, height, width), folder, shape = stage.latents, stage.folder, stage.shape
    text, pooled = folder.text_lengths

    def pixels(side: int) -> torch.Tensor:
        return torch.empty(SAMPLES, 3, side, side, dtype=torch.uint8)

    with torch.device("meta"):
        inputs: dict[str, Any] = {
            "posterior": torch.empty(SAMPLES * draws, channels, height, width),
            "noise": torch.empty(SAMPLES * draws, height * width // 4, 4 * channels),
            "level": torch.empty(SAMPLES * draws),
        }
        if cached:
            patches = stage.config.vision_config
            side = stage.data.image_size // patches.patch_size // patches.spatial_merge_size
            inputs |= {name: torch.empty(SAMPLES, channels, height, width) for name in ("mean", "std")}
            inputs["text"] = torch.empty(SAMPLES, text, folder.t5.d_model)
            inputs["pooled"] = torch.empty(SAMPLES, folder.clip.hidden_size)
            inputs["latents"] = torch.empty(SAMPLES, side * side, shape.latent_width)
        else:
            inputs |= {"images": pixels(stage.data.image_size), "flux_images": pixels(stage.flux.image_size)}
            inputs["t5"] = torch.empty(SAMPLES, text, dtype=torch.int64)
            inputs["clip"] = torch.empty(SAMPLES, pooled, dtype=torch.int64)
    return _counted(recipe, stage, inputs, draws)


def _counted(recipe: Recipe, stage: Any, inputs: dict[str, Any], draws: int) -> tuple[float, float]:
    with torch.device("meta"):
        model = stage.build()
    with FlopCounterMode(display=False) as counter:
        model(**inputs, normalizer=1.0).loss.backward()
    return counter.get_total_flops() / SAMPLES / draws, useful_flops(parts(recipe, TEXT)) / draws


def table(names: Sequence[str], count: Callable[[str, int, bool], tuple[float, float]], draws: Sequence[int]) -> None:
    """Print the rows of recipes, relative to each one's first."""
    for name in names:
        first = 0.0
        for cached in (False, True):
            for number in draws:
                found, planned = count(name, number, cached)
                first = first or found
                what = "cached" if cached else "computed"
                row = f"| `{name}` | {what} | {number} | {found / 1e12:.2f} T | {first / found:.2f}x"
                print(f"{row} | {planned / 1e12:.2f} T |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--stage", type=int, choices=[1, 2], nargs="*", default=[1, 2])
    asked = parser.parse_args()
    if 1 in asked.stage:
        print("| recipe | vision encoder | masks per sample | counted | fewer by | as planned |")
        print("|---|---|---:|---:|---:|---:|")
        table(("mllm-7b", "mllm-3b"), flops_per_mask, asked.draws)
    if 2 in asked.stage:
        print("| recipe | VAE, text and vision encoders | noise levels per sample | counted | fewer by | as planned |")
        print("|---|---|---:|---:|---:|---:|")
        table(("flux-controlnet",), flops_per_level, asked.draws)


if __name__ == "__main__":
    main()
