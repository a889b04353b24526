"""Train a vision encoder like the tiny Qwen2.5-VL's, on the same scenes but without its language model.

    python examples/foundations/tiny_encoder.py runs/tiny-encoder

It matches images with captions, read by a small text encoder of its own, and keeps the pixels: the losses of
`tiny_mllm.py` that need no language model. OUT is for `branch.encoder`. Equal seeds and steps give equal weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from mllm_init import WIDTH, build, every_latent, latents
from mllm_objectives import (
    MATCH_WEIGHT,
    PIXEL_WEIGHT,
    SCALE_WEIGHT,
    Heads,
    pixel_targets,
    ridge,
    to_images,
    with_one,
)
from safetensors.torch import save_file
from tiny_mllm import BATCH, FITTED_IMAGES, MEASURED, SCENES, learning_rate, optimizers, shifted
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bifrost.data import Plan
from bifrost.data.scenes.heldout import HELD_OUT, heldout_scenes, training_scenes
from bifrost.recipes import FOLDER

LONGEST, LAYERS, HEADS = 64, 2, 6


class Captions(Heads):
    """`Heads`, with a text encoder that reads captions instead of the language model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.words = nn.Embedding(len(tokenizer), WIDTH)
        self.places = nn.Parameter(torch.randn(LONGEST, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def states(self, captions: list[str]) -> Tensor:
        """A state of every caption, [B, WIDTH]: the mean over its tokens."""
        rows = [self.tokenizer.encode(caption, add_special_tokens=False)[:LONGEST] for caption in captions]
        there = torch.arange(max(map(len, rows))) < torch.tensor([[len(row)] for row in rows])
        ids = torch.zeros(there.shape, dtype=torch.long)
        ids[there] = torch.tensor([token for row in rows for token in row])
        states = self.layers(self.words(ids) + self.places[: ids.shape[1]], src_key_padding_mask=~there)
        return (states * there[..., None]).sum(1) / there.sum(1, keepdim=True)


def losses(z: Tensor, heads: Captions, images: Tensor, captions: list[str]) -> dict[str, Tensor]:
    """Weighted losses of one batch of uint8 images [B, 3, S, S] with latents z [B, N, WIDTH], and their captions."""
    similar, own = heads.match(z, heads.states(captions)), torch.arange(len(captions))
    return {
        "match": MATCH_WEIGHT * (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2,
        "pixels": PIXEL_WEIGHT * F.mse_loss(heads.pixels(z).float(), pixel_targets(images)),
        "scale": SCALE_WEIGHT * (z.float().square().mean() - 1).square(),
    }


def train(model: nn.Module, heads: Captions, images: Tensor, captions: list[str], steps: int, seed: int) -> None:
    """Train the model's vision encoder in place."""
    plan, rules, started = Plan([len(captions)], seed), optimizers(model, heads), time.monotonic()
    parameters = [*model.parameters(), *heads.parameters()]
    for step in range(steps):
        chosen = plan.locate(np.arange(step * BATCH, (step + 1) * BATCH)).index
        batch = shifted(images[torch.from_numpy(chosen)], np.random.default_rng((seed, step)))
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            parts = losses(latents(model, batch), heads, batch, [captions[i] for i in chosen])
            loss = torch.stack(list(parts.values())).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for rule in rules:
            for group in rule.param_groups:
                group["lr"] = group["scale"] * learning_rate(step, steps)
            rule.step()
            rule.zero_grad()
        if (step + 1) % 25 == 0 or step + 1 == steps:
            shown = "  ".join(f"{name} {value.item():.3f}" for name, value in parts.items())
            print(f"step {step + 1:5d}  {shown}  {(time.monotonic() - started) / (step + 1):.3f} s/step", flush=True)


@torch.no_grad()
def report(model: nn.Module, heads: Captions, images: Tensor, captions: list[str], weights: Tensor) -> dict[str, float]:
    """Fraction of images whose own caption is the most similar one, and dB of pixels that `weights` [WIDTH + 1, C]
    predict from single latents."""
    z = every_latent(model, images)
    error = (with_one(z) @ weights).clamp(-1, 1) - pixel_targets(images).flatten(0, 1)
    nearest = heads.match(z, heads.states(captions)).argmax(1)
    own = (nearest == torch.arange(len(captions))).float().mean().item()
    psnr = -10 * (error.square().mean() / 4).log10().item()
    return {"image_to_caption_r1": round(own, 4), "probe_psnr": round(psnr, 2), "std": round(z.std().item(), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the encoder")
    parser.add_argument("--steps", type=int, default=600, help=f"steps of {BATCH} scenes (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=SCENES, help="training scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    scenes = training_scenes(arguments.scenes, arguments.seed)
    images, captions = to_images(scenes), [scene.caption for scene in scenes]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "foundations" / "tiny")
    model, heads = build(tokenizer, images[:FITTED_IMAGES]), Captions(tokenizer)
    heads.fit_pixels(every_latent(model, images[:FITTED_IMAGES]), images[:FITTED_IMAGES])
    train(model, heads, images, captions, arguments.steps, arguments.seed)

    model.config.save_pretrained(arguments.out)
    visual = {
        f"visual.{name}": x.to(torch.bfloat16).contiguous() for name, x in model.model.visual.state_dict().items()
    }
    save_file(visual, arguments.out / "model.safetensors", {"format": "pt"})
    seen = list({scene.caption: scene for scene in scenes}.values())[:MEASURED]
    parts = {"train": seen, "heldout": heldout_scenes(MEASURED // len(HELD_OUT), arguments.seed + 1)}
    weights = ridge(every_latent(model, to_images(seen)), pixel_targets(to_images(seen)))
    shown = {
        name: report(model, heads, to_images(part), [scene.caption for scene in part], weights)
        for name, part in parts.items()
    }
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
