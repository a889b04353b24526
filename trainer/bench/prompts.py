"""Input of a timed step: prompts of fixed or realistic lengths, and random images."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RunError

MEAN, SPREAD = 80, 0.5
"""`--text-tokens real`: mean number of tokens per prompt, and standard deviation of its logarithm."""


@dataclass(frozen=True)
class Case:
    """Prompts of the given lengths in tokens, which the dense baseline pads to `padded`."""

    name: str
    lengths: tuple[int, ...]
    padded: int


@dataclass
class Batch:
    """One micro-batch, as both baselines take it."""

    images: Tensor
    latents: Tensor
    mask: Tensor
    masked: Tensor
    input_ids: Tensor
    """Padded on the left, [B, T]."""
    real: Tensor
    lengths: tuple[int, ...]


def cases(text_tokens: str, samples: int, longest: int) -> list[Case]:
    """The cases of `--text-tokens`; RunError names what cannot be parsed."""
    found = []
    for word in text_tokens.split(","):
        if word == "real":
            lengths = real_lengths(samples, longest)
            found.append(Case(word, lengths, longest))
        elif word.isdecimal() and int(word) > 0:
            found.append(Case(word, (int(word),) * samples, int(word)))
        else:
            raise RunError(f"--text-tokens {text_tokens}: give whole numbers and `real`, such as 80,300,real")
    return found


def real_lengths(samples: int, longest: int) -> tuple[int, ...]:
    """Realistic prompt lengths in tokens: evenly spaced quantiles of a lognormal, at most `longest`."""
    normal = statistics.NormalDist(math.log(MEAN) - SPREAD**2 / 2, SPREAD)
    drawn = [math.exp(normal.inv_cdf((i + 0.5) / samples)) for i in range(samples)]
    return tuple(max(1, min(longest, round(length))) for length in drawn)


def draw_batch(
    case: Case, tokens: int, side: int, config: Any, device: torch.device, dtype: torch.dtype, draws: int = 1
) -> Batch:
    """Random images, latents, masks and prompts; `draws` masks per sample."""
    draw = torch.Generator(device).manual_seed(1)
    samples, vocabulary = len(case.lengths), config.text_config.vocab_size

    def integers(high: int, *shape: int, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, high, shape, generator=draw, device=device, dtype=kind)

    mask = torch.rand(samples * draws, tokens, generator=draw, device=device) < 0.867  # MAR's mean rate
    return Batch(
        images=integers(256, samples, 3, side, side, kind=torch.uint8),
        latents=torch.randn(samples, tokens, config.text_config.hidden_size, generator=draw, device=device).to(dtype),
        mask=mask,
        masked=mask.flatten().nonzero()[:, 0],
        input_ids=integers(vocabulary, samples, case.padded),
        real=torch.arange(case.padded, device=device)
        >= case.padded - torch.tensor(case.lengths, device=device)[:, None],
        lengths=case.lengths,
    )
