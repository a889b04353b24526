"""Train the demo's tiny Qwen2.5-VL and its tokenizer on the demo dataset.

    bifrost data demo demo
    python examples/foundations/tiny_mllm.py demo recipes/foundations/tiny

It learns to caption drawings, to predict captions in stage 1's prompts, and to keep the image itself in its patch
latents, which stage 2 decodes to pixels. Equal seeds, steps and thread counts give equal weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mllm_init import IMAGE_SIZE, build, every_latent
from mllm_objectives import Heads, Prompts, losses
from mllm_probes import report
from tokenizer import train_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bifrost.data import Loader, LoaderSettings, Plan, Share, open_dataset

BATCH = 48
LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 50
FINAL_SHARE = 0.03  # of the learning rate, reached linearly over the second half
MATRICES = ("layers.", "blocks.", "merger.")
FITTED, FITTED_SCALE = ("model.visual", "pixels."), 0.2  # initialized to a solution, which full steps would lose
SHIFT = 5  # maximal shift of a drawing in pixels; its border is replicated


class Pairs(NamedTuple):
    """A split of the demo dataset: images uint8 [n, 3, S, S], captions, and the plan of their order."""

    images: Tensor
    captions: list[str]
    plan: Plan


def read_pairs(shards: str, seed: int) -> Pairs:
    """All pairs of `shards`, decoded once: the demo dataset fits in memory."""
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
    return Pairs(images, captions, Plan([len(captions)], seed))


def shifted(images: Tensor, draws: np.random.Generator) -> Tensor:
    """Images randomly shifted by up to SHIFT pixels."""
    padded = F.pad(images.float(), (SHIFT,) * 4, mode="replicate").to(torch.uint8)
    corners = draws.integers(0, 2 * SHIFT + 1, (len(images), 2)).tolist()
    moved = [p[:, y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] for p, (y, x) in zip(padded, corners, strict=True)]
    return torch.stack(moved)


def optimizers(model: nn.Module, heads: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks and merger, AdamW for all others; `scale` multiplies the learning rate."""
    parameters = [*model.named_parameters(), *heads.named_parameters()]
    matrices = [p for name, p in parameters if p.ndim == 2 and any(part in name for part in MATRICES)]
    chosen = set(map(id, matrices))
    rest = [(name, p) for name, p in parameters if id(p) not in chosen]
    fitted = [p for name, p in rest if name.startswith(FITTED)]
    free = [p for name, p in rest if not name.startswith(FITTED)]
    groups = [{"params": free, "scale": 1.0}, {"params": fitted, "scale": FITTED_SCALE}]
    return [
        torch.optim.Muon(
            [{"params": matrices, "scale": 1.0}], lr=LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def learning_rate(step: int, steps: int) -> float:
    """Warmup, constant, then linear decay over the second half."""
    late = max(0.0, 2 * step / steps - 1)
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - (1 - FINAL_SHARE) * late)


def train(model: nn.Module, heads: Heads, prompts: Prompts, pairs: Pairs, steps: int) -> None:
    """Train in place for `steps` steps on `pairs`."""
    draws = np.random.default_rng(pairs.plan.seed)
    rules = optimizers(model, heads)
    parameters = [*model.parameters(), *heads.parameters()]
    started = time.monotonic()
    for step in range(steps):
        chosen = pairs.plan.locate(np.arange(step * BATCH, (step + 1) * BATCH)).index
        images = shifted(pairs.images[torch.from_numpy(chosen)], draws)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            parts = losses(model, heads, prompts, images, [pairs.captions[i] for i in chosen])
            loss = parts.total()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for rule in rules:
            for group in rule.param_groups:
                group["lr"] = group["scale"] * learning_rate(step, steps)
            rule.step()
            rule.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            shown = "  ".join(f"{name} {value.item():.3f}" for name, value in parts._asdict().items())
            print(f"step {step + 1:5d}  {shown}  {(time.monotonic() - started) / (step + 1):.3f} s/step", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder that `bifrost data demo` wrote")
    parser.add_argument("out", type=Path, help="folder for the model and tokenizer")
    parser.add_argument("--steps", type=int, default=1000, help="steps of 48 pairs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.set_flush_denormal(True)
    pairs = read_pairs(f"{arguments.demo}/train-*.tar", arguments.seed)
    heldout = read_pairs(f"{arguments.demo}/heldout-*.tar", arguments.seed)
    prompts = Prompts(train_tokenizer(pairs.captions, 1536, arguments.out))
    model, heads = build(prompts.tokenizer, pairs.images), Heads()
    heads.fit_pixels(every_latent(model, pairs.images), pairs.images)
    train(model, heads, prompts, pairs, arguments.steps)
    model.to(torch.bfloat16).save_pretrained(arguments.out)

    print(json.dumps(report(model.float(), heads, prompts, pairs[:2], heldout[:2]), indent=1))


if __name__ == "__main__":
    main()
