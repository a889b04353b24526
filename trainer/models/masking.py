"""Masking: a mask rate per sample from MAR's truncated normal, then a uniformly random order of patches.

Source: LTH14/mar, `models/mar.py`. Here the rate is drawn per sample, so that no draw depends on how samples are
grouped into batches.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .rng import IntArray, Stream, uniform


def masked_counts(
    seed: int, epoch: IntArray, index: IntArray, tokens: int, *, mean: float, std: float, low: float, high: float
) -> IntArray:
    """Masked patches per sample [B]: ceil(tokens * rate), rate ~ N(mean, std) truncated to [low, high]."""
    draws = torch.from_numpy(uniform(seed, Stream.MASK_RATE, epoch, index, 1)[:, 0])
    floor = torch.special.ndtr(torch.tensor((low - mean) / std, dtype=torch.float64))
    ceiling = torch.special.ndtr(torch.tensor((high - mean) / std, dtype=torch.float64))
    rate = mean + std * torch.special.ndtri(floor + draws * (ceiling - floor))
    rate = rate.clamp(low, high).numpy()
    # A rate of exactly k / tokens must give k: the tolerance absorbs the rounding of the product.
    return np.ceil(rate * tokens - 1e-9).astype(np.int64)


def draw_masks(seed: int, epoch: IntArray, index: IntArray, counts: IntArray, tokens: int) -> npt.NDArray[np.bool_]:
    """Masks [B, tokens], True where masked, with exactly `counts` [B] masked patches per sample."""
    return draw_orders(seed, epoch, index, tokens).argsort(axis=1) < counts[:, None]


def draw_orders(seed: int, epoch: IntArray, index: IntArray, tokens: int) -> IntArray:
    """The order [B, tokens] in which patches are masked: a mask covers the first entries."""
    return uniform(seed, Stream.MASK_ORDER, epoch, index, tokens).argsort(axis=1)
