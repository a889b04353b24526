"""Measures of the trained tiny model on lists of scenes.

Legend: n images, N patch latents of WIDTH channels.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from mllm_init import every_latent
from mllm_objectives import (
    IGNORED,
    Heads,
    Prompts,
    hidden_states,
    pixel_targets,
    ridge,
    to_images,
    token_losses,
    with_one,
)
from tokenizer import DESCRIBE
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from bifrost.data.scenes.grammar import Scene
from bifrost.data.scenes.questions import questions

CHUNK = 64


@torch.no_grad()
def report(
    model: Qwen2_5_VLForConditionalGeneration, heads: Heads, prompts: Prompts, parts: dict[str, list[Scene]]
) -> dict[str, dict[str, float]]:
    """Measures of lists of scenes; the linear probe is fitted on the first.

    caption_ce, text_ce: nats per token, with and without the image. image_to_caption_r1: fraction of images whose own
    caption is the most similar one of the list. swapped: the same for pairs, against the caption of the same objects in
    exchanged places. probe_psnr: dB of pixels predicted linearly from single latents. position_mean_mse: squared error
    of predicting each position's mean latent of the first list. answer_KIND: fraction of exactly answered questions.
    """
    images = {name: to_images(scenes) for name, scenes in parts.items()}
    z = {name: every_latent(model, pixels) for name, pixels in images.items()}
    first = next(iter(parts))
    weights = ridge(z[first], pixel_targets(images[first]))
    mean, position_mean = z[first].mean(dim=(0, 1)), z[first].mean(dim=0)
    found: dict[str, dict[str, float]] = {}
    for name, scenes in parts.items():
        captions = [scene.caption for scene in scenes]
        error = (with_one(z[name]) @ weights).clamp(-1, 1) - pixel_targets(images[name]).flatten(0, 1)
        found[name] = {
            "images": len(scenes),
            **_language(model, heads, prompts, z[name], captions),
            "swapped": _swapped(model, heads, prompts, scenes, z[name]),
            "probe_psnr": -10 * (error.square().mean() / 4).log10().item(),
            "latent_std": z[name].std().item(),
            "latent_effective_rank": _effective_rank(z[name]),
            "mean_mse": (z[name] - mean).square().mean().item(),
            "position_mean_mse": (z[name] - position_mean).square().mean().item(),
            **answers(model, prompts, scenes, z[name]),
        }
    return {part: {key: round(value, 4) for key, value in values.items()} for part, values in found.items()}


@torch.no_grad()
def answers(
    model: Qwen2_5_VLForConditionalGeneration, prompts: Prompts, scenes: list[Scene], z: Tensor
) -> dict[str, float]:
    """Fraction of questions on images with latents z [n, N, WIDTH] whose greedy answer is right to the last token."""
    asked = [(row, question) for row, scene in enumerate(scenes) for question in questions(scene)]
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(asked), CHUNK):
        part = asked[start : start + CHUNK]
        row = prompts.answer([[(question.text, question.answer)] for _, question in part])
        states = hidden_states(model, row, z[[image for image, _ in part]], prompts.image_at)
        # Right at every token given the right tokens before it is the same as right when decoded greedily.
        wrong = (model.lm_head(states).argmax(dim=-1) != row.targets) & (row.targets != IGNORED)
        for (_, question), is_wrong in zip(part, wrong.any(dim=1).tolist(), strict=True):
            right[question.kind].append(not is_wrong)
    return {f"answer_{kind}": float(np.mean(values)) for kind, values in sorted(right.items())}


def _prompt_states(model: Qwen2_5_VLForConditionalGeneration, prompts: Prompts, captions: list[str]) -> Tensor:
    """State of every prompt's last token, [n, WIDTH]."""
    states = []
    for start in range(0, len(captions), CHUNK):
        prompt = prompts.generate(captions[start : start + CHUNK])
        states.append(hidden_states(model, prompt, None)[torch.arange(len(prompt.last)), prompt.last])
    return torch.cat(states)


def _language(
    model: Qwen2_5_VLForConditionalGeneration, heads: Heads, prompts: Prompts, z: Tensor, captions: list[str]
) -> dict[str, float]:
    with_image, without_image = [], []
    for start in range(0, len(captions), CHUNK):
        part = slice(start, start + CHUNK)
        prompt = prompts.generate(captions[part])
        answer = prompts.answer([[(DESCRIBE, caption)] for caption in captions[part]])
        with_image.append(token_losses(model, hidden_states(model, answer, z[part], prompts.image_at), answer))
        without_image.append(token_losses(model, hidden_states(model, prompt, None), prompt))
    matched = heads.match(z, _prompt_states(model, prompts, captions)).argmax(dim=1) == torch.arange(len(captions))
    return {
        "caption_ce": torch.cat(with_image).mean().item(),
        "text_ce": torch.cat(without_image).mean().item(),
        "image_to_caption_r1": matched.float().mean().item(),
    }


def _swapped(
    model: Qwen2_5_VLForConditionalGeneration, heads: Heads, prompts: Prompts, scenes: list[Scene], z: Tensor
) -> float:
    """Fraction of two-object images that match their caption better than "b and a" in place of "a and b"."""
    pairs = [row for row, scene in enumerate(scenes) if scene.category in ("two", "binding", "unseen_colour")]
    if not pairs:
        return float("nan")
    own = [scenes[row].caption for row in pairs]
    other = [" and ".join(reversed(caption.split(" and "))) for caption in own]
    similar = [heads.match(z[pairs], _prompt_states(model, prompts, texts)).diagonal() for texts in (own, other)]
    return (similar[0] > similar[1]).float().mean().item()


def _effective_rank(z: Tensor) -> float:
    """Exponential of the entropy of the covariance's eigenvalues (Roy and Vetterli, 2007)."""
    shares = torch.linalg.eigvalsh(z.flatten(0, 1).T.cov()).clamp_min(1e-12)
    shares = shares / shares.sum()
    return (-(shares * shares.log()).sum()).exp().item()
