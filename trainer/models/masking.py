"""Masking: a mask rate per sample from MAR's truncated normal, then a uniformly random order of patches.

Source: LTH14/mar, `models/mar.py`. Here the rate is drawn per sample, so that no draw depends on how samples are
grouped into batches.

A sample may have several masks, K `draws`. Draw j is a hash of (seed, epoch, sample, j), whatever K is. Arrays of
[B K] have the draws of a sample next to each other.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from ...recipes.branch import MaskRate
from .rng import IntArray, Stream, uniform


def hidden_counts(rate: MaskRate, seed: int, epoch: IntArray, index: IntArray, tokens: int, draws: int = 1) -> IntArray:
    """Masked patches of every draw [B K]: ceil(tokens * r), r ~ N(mean, std) truncated to [low, high]."""
    numbers = uniform(seed, Stream.MASK_RATE, epoch, index, draws).ravel()
    normal = NormalDist(rate.mean, rate.std)
    floor, ceiling = normal.cdf(rate.low), normal.cdf(rate.high)
    # Far from the mean, cdf rounds to 0 or 1, of which there is no inverse.
    shares = (floor + numbers * (ceiling - floor)).clip(_LEAST, 1 - _LEAST)
    rates = np.array([normal.inv_cdf(share) for share in shares.tolist()]).clip(rate.low, rate.high)
    # A rate of exactly k / tokens must give k: the tolerance absorbs the rounding of the product.
    return np.ceil(rates * tokens - 1e-9).astype(np.int64)


_LEAST = 2.0**-53


def draw_masks(seed: int, epoch: IntArray, index: IntArray, counts: IntArray, tokens: int) -> npt.NDArray[np.bool_]:
    """Masks [B K, tokens], True where masked, with exactly `counts` [B K] masked patches per draw."""
    draws = len(counts) // max(1, len(index))
    return draw_orders(seed, epoch, index, tokens, draws).argsort(axis=1) < counts[:, None]


def draw_orders(seed: int, epoch: IntArray, index: IntArray, tokens: int, draws: int = 1) -> IntArray:
    """The order [B K, tokens] in which patches are masked: a mask covers the first entries."""
    numbers = uniform(seed, Stream.MASK_ORDER, epoch, index, draws * tokens)
    return numbers.reshape(-1, tokens).argsort(axis=1)
