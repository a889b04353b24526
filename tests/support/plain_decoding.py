"""Decoding of patch latents by plain loops, from full passes over the image of one prompt."""

from __future__ import annotations

import torch

from bifrost.kernels import PrefixLayout
from bifrost.trainer.inference.latent_decoder import LatentDecoder
from bifrost.trainer.inference.masked_decoding import draw_orders, reveal_counts


@torch.no_grad()
def latents(decoder: LatentDecoder, prompt: str, seed: int, steps: int, grid: tuple[int, int]) -> torch.Tensor:
    """One image's latents [N, D], predicting every patch in every step."""
    model, patches = decoder.mllm, grid[0] * grid[1]
    input_ids, lengths = decoder.template.batch([prompt])
    prefix = model.backbone.prefix(input_ids, PrefixLayout.of(lengths, patches))
    found = torch.zeros(1, patches, model.branch.config.hidden_size)
    hidden = torch.ones(1, patches, dtype=torch.bool)
    order = draw_orders([seed], patches)[0].tolist()
    for count in reveal_counts(patches, steps, "cosine"):
        predicted = model.head(model.branch(found, hidden, prefix, grid=grid))[0]
        for patch in order[:count]:
            found[0, patch], hidden[0, patch] = predicted[patch], False
        order = order[count:]
    return found[0]
