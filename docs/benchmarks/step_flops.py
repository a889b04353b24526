"""FLOPs of a stage-1 step per mask, counted by torch's FlopCounterMode at the models' full size on the meta device.

`python docs/benchmarks/step_flops.py` prints the table in docs/benchmarks/step.md: forward and backward of two samples
of 80 text tokens, without activation checkpointing, which the counter includes.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bifrost.recipes import load_recipe
from bifrost.trainer.planner import parts
from bifrost.trainer.planner.timing import useful_flops
from bifrost.trainer.stages import open_patch_latents

SAMPLES, TEXT = 2, 80


def flops_per_mask(name: str, draws: int, cached: bool) -> tuple[float, float]:
    """FLOPs of a mask: counted by torch, and as `bifrost plan` counts them."""
    settings = ["activation_checkpointing=false", f"branch.draws={draws}"]
    recipe = load_recipe(name, [*settings, *(["backbone.vision_encoder=cached"] if cached else [])])
    stage = open_patch_latents(recipe, for_counting=True)
    size, patches, width = recipe.data.image_size, stage.tokens_per_image, stage.config.text_config.hidden_size
    with torch.device("meta"):
        model = stage.build()
        latents = torch.empty(SAMPLES, patches, width)
        inputs: dict[str, Any] = {
            "input_ids": torch.empty(SAMPLES * TEXT, dtype=torch.int64),
            "mask": torch.empty(SAMPLES * draws, patches, dtype=torch.bool),
            "masked": torch.empty(SAMPLES * draws * patches, dtype=torch.int64),
            "images": torch.empty(SAMPLES, 3, size, size, dtype=torch.uint8),
        }
    inputs |= {"images": None, "latents": latents} if cached else {}
    with FlopCounterMode(display=False) as counter:
        model(**inputs, text_lengths=(TEXT,) * SAMPLES, normalizer=1.0).loss.backward()
    return counter.get_total_flops() / SAMPLES / draws, useful_flops(parts(recipe, TEXT)) / draws


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, nargs="*", default=[1, 2, 4])
    print("| recipe | vision encoder | masks per sample | counted | fewer by | as planned |")
    print("|---|---|---:|---:|---:|---:|")
    for name in ("mllm-7b", "mllm-3b"):
        first = 0.0
        for cached in (False, True):
            for draws in parser.parse_args().draws:
                found, planned = flops_per_mask(name, draws, cached)
                first = first or found
                what = "cached" if cached else "computed"
                row = f"| `{name}` | {what} | {draws} | {found / 1e12:.2f} T | {first / found:.2f}x"
                print(f"{row} | {planned / 1e12:.2f} T |", flush=True)


if __name__ == "__main__":
    main()
