"""Measures of the trained tiny model on training and held-out drawings.

Legend: n images, N patch latents of WIDTH channels, R = n * N rows, S pixels per side.
"""

from __future__ import annotations

import torch
from mllm_init import every_latent
from mllm_objectives import Heads, Prompts, caption_losses, hidden_states, pixel_targets, ridge, with_one
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

CHUNK = 64


@torch.no_grad()
def report(
    model: Qwen2_5_VLForConditionalGeneration,
    heads: Heads,
    prompts: Prompts,
    train: tuple[Tensor, list[str]],
    heldout: tuple[Tensor, list[str]],
) -> dict[str, dict[str, float]]:
    """Measures of uint8 images [n, 3, S, S] with captions; the linear probe is fitted on `train`.

    caption_ce, text_ce: nats per token, with and without the image. image_to_caption_r1: fraction of images whose own
    caption is the nearest in the split. probe_psnr: dB of pixels predicted linearly from single latents.
    position_mean_mse: squared error of predicting each position's mean latent of the training split.
    """
    z = {"train": every_latent(model, train[0]), "heldout": every_latent(model, heldout[0])}
    weights = ridge(z["train"], pixel_targets(train[0]))
    mean = z["train"].mean(dim=(0, 1))
    position_mean = z["train"].mean(dim=0)
    found: dict[str, dict[str, float]] = {}
    for name, (images, captions) in {"train": train, "heldout": heldout}.items():
        with_image, without_image, matched = _language(model, heads, prompts, z[name], captions)
        pixels = with_one(z[name]) @ weights
        error = (pixels.clamp(-1, 1) - pixel_targets(images).flatten(0, 1)).square().mean() / 4
        found[name] = {
            "images": len(captions),
            "caption_ce": with_image,
            "text_ce": without_image,
            "image_to_caption_r1": matched,
            "probe_psnr": -10 * error.log10().item(),
            "latent_std": z[name].std().item(),
            "latent_effective_rank": _effective_rank(z[name]),
            "mean_mse": (z[name] - mean).square().mean().item(),
            "position_mean_mse": (z[name] - position_mean).square().mean().item(),
        }
    return {part: {key: round(value, 4) for key, value in values.items()} for part, values in found.items()}


def _language(
    model: Qwen2_5_VLForConditionalGeneration, heads: Heads, prompts: Prompts, z: Tensor, captions: list[str]
) -> tuple[float, float, float]:
    """Cross-entropies with and without the image, and the fraction of images matched with their caption."""
    with_image, without_image, states = [], [], []
    for start in range(0, len(captions), CHUNK):
        part = slice(start, start + CHUNK)
        answer, prompt = prompts.describe(captions[part]), prompts.generate(captions[part])
        hidden = hidden_states(model, prompt, None)
        states.append(hidden[torch.arange(len(hidden)), prompt.last])
        with_image.append(caption_losses(model, hidden_states(model, answer, z[part], prompts.image_at), answer))
        without_image.append(caption_losses(model, hidden, prompt))
    similar = heads.match(z, torch.cat(states))
    matched = similar.argmax(dim=1) == torch.arange(len(captions))
    return torch.cat(with_image).mean().item(), torch.cat(without_image).mean().item(), matched.float().mean().item()


def _effective_rank(z: Tensor) -> float:
    """Exponential of the entropy of the covariance's eigenvalues (Roy and Vetterli, 2007)."""
    shares = torch.linalg.eigvalsh(z.flatten(0, 1).T.cov()).clamp_min(1e-12)
    shares = shares / shares.sum()
    return (-(shares * shares.log()).sum()).exp().item()
