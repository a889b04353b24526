"""Error of frozen weights in 8 bits: of the loss and of generated latents, against fp32 weights and computation.

    .venv/bin/python docs/benchmarks/eight_bits.py [--prompts 8]

Prints a Markdown table for the bundled models and for a random text model of middle size. The errors of bf16 weights,
of which those in 8 bits are a further rounding, are in the same table; all but the reference compute in bf16. Stage 1
has an untrained branch, a copy of the text model's layers; FLUX runs without ControlNet. Inputs and noise are equal
throughout.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bifrost.kernels import PrefixLayout
from bifrost.recipes.fields import HeldWeights
from bifrost.recipes.schema import Backbone, Branch
from bifrost.trainer.inference.flux_sampler import Text, draw_noise, sample
from bifrost.trainer.inference.generator import load_flux
from bifrost.trainer.inference.masked_decoding import decode, draw_orders
from bifrost.trainer.inference.settings import Sampling
from bifrost.trainer.models import flux as flow
from bifrost.trainer.models.flux import FluxFolder, Tokens
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.prompt import PromptTemplate
from bifrost.trainer.stages.patch_latents import PatchLatentStage
from bifrost.trainer.stages.unsharded import init_context

IMAGE_SIZE = 112
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
STEPS = 8
WORDS = ("a red apple", "a blue fish above a tree", "two yellow stars", "a green car left of a dog")
VARIANTS: tuple[tuple[HeldWeights, torch.dtype], ...] = (
    ("bf16", torch.float32),
    ("bf16", torch.bfloat16),
    ("int8", torch.bfloat16),
    ("fp8", torch.bfloat16),
)


class Found(NamedTuple):
    """Bytes of the frozen text model or transformer, loss, and generated latents."""

    size: int
    loss: float
    latents: Tensor


def size(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@torch.no_grad()
def text_model(path: Path, held: HeldWeights, dtype: torch.dtype, prompts: list[str]) -> Found:
    """Stage 1 behind a text model."""
    stage = PatchLatentStage.open(Backbone(path=str(path), weights=held), Branch(), IMAGE_SIZE, seed=0)
    with init_context(torch.device("cpu"), dtype):
        model = stage.build().eval()
    stage.load(model)
    assert stage.tokenizer is not None
    input_ids, lengths = PromptTemplate(stage.tokenizer, 300).batch(prompts)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(prompts), 3, IMAGE_SIZE, IMAGE_SIZE), generator=draw, dtype=torch.uint8)
    mask = torch.rand(len(prompts), stage.tokens_per_image, generator=draw) < 0.8
    masked = mask.flatten().nonzero()[:, 0]
    losses = model(images, input_ids, tuple(lengths), mask, masked, float(mask.numel()))
    prefix = model.backbone.prefix(input_ids, PrefixLayout.of(lengths, stage.tokens_per_image, input_ids.device))
    orders = draw_orders(range(len(prompts)), stage.tokens_per_image)
    latents = decode(model.branch, model.head, prefix, orders, STEPS)
    return Found(size(model.backbone.text), float(losses.loss), latents.float())


@torch.no_grad()
def flux(path: Path, held: HeldWeights, dtype: torch.dtype, prompts: list[str]) -> Found:
    """FLUX's transformer, at several noise levels and over all sampling steps."""
    frozen = load_flux(FluxFolder.open(path, held), torch.device("cpu"), dtype)
    tokens = frozen.folder.tokenizers(prompts)
    states, pooled = frozen.encode_text(Tokens(tokens.t5, tokens.clip))
    side, channels = 16, frozen.folder.transformer["in_channels"]
    noise = draw_noise(range(len(prompts)), side**2, channels)
    latents = draw_noise(range(100, 100 + len(prompts)), side**2, channels)
    losses = []
    for level in LEVELS:
        sigma = torch.full((len(prompts),), level)
        velocity = flow.velocity(
            frozen.transformer,
            flow.noisy(latents, noise, sigma),
            None,
            states,
            pooled,
            sigma,
            frozen.guidance(3.5, len(prompts)),
            flow.image_ids(2 * side, 2 * side),
            torch.zeros(states.shape[1], 3),
        )
        losses.append((velocity - flow.target(latents, noise)).square().mean())
    made = sample(frozen, Text(states, pooled), noise, Sampling(steps=STEPS))
    return Found(size(frozen.transformer), float(torch.stack(losses).mean()), made.float())


def middle_text_model(folder: Path) -> Path:
    """A random MLLM with 8 layers of width 512."""
    shutil.copytree(locate("builtin:tiny"), folder)
    stated = json.loads((folder / "config.json").read_text())
    stated["text_config"].pop("layer_types", None)
    stated["text_config"].update(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2
    )
    stated["text_config"]["rope_parameters"]["mrope_section"] = [8, 12, 12]
    stated["vision_config"]["out_hidden_size"] = 512
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(stated)).save_pretrained(folder)
    return folder


def rows(name: str, measure: Callable[..., Found], path: Path, prompts: list[str]) -> None:
    """Print the rows of one model."""
    found = {(held, dtype): measure(path, held, dtype, prompts) for held, dtype in VARIANTS}
    reference = found[VARIANTS[0]]
    for held, dtype in VARIANTS[1:]:
        one = found[held, dtype]
        loss = abs(one.loss / reference.loss - 1)
        latents = float((one.latents - reference.latents).norm() / reference.latents.norm())
        print(f"| {name} | {held} | {one.size / 2**20:,.1f} | {loss:.2%} | {latents:.2%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=8, help="prompts and images per model")
    prompts = list(np.resize(WORDS, parser.parse_args().prompts))
    print("| model | weights | MiB | loss | generated latents |\n|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as place:
        rows("text model of `builtin:tiny`", text_model, locate("builtin:tiny"), prompts)
        rows("random text model", text_model, middle_text_model(Path(place) / "text"), prompts)
        rows("`builtin:tiny-flux`", flux, locate("builtin:tiny-flux", None, "flux.path", "*"), prompts)


if __name__ == "__main__":
    main()
