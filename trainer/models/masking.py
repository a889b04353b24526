"""Masking: a mask rate per sample from MAR's truncated normal, then a uniformly random order of patches.

Source: LTH14/mar, `models/mar.py`. Here the rate is drawn per sample, so that no draw depends on how samples are
grouped into batches.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from ...recipes.schema import MaskRate
from .rng import IntArray, Stream, uniform


def hidden_counts(rate: MaskRate, seed: int, epoch: IntArray, index: IntArray, tokens: int) -> IntArray:
    """Masked patches per sample [B], of `tokens`."""
    return masked_counts(seed, epoch, index, tokens, **rate.model_dump())


def masked_counts(
    seed: int, epoch: IntArray, index: IntArray, tokens: int, *, mean: float, std: float, low: float, high: float
) -> IntArray:
    """Masked patches per sample [B]: ceil(tokens * rate), rate ~ N(mean, std) truncated to [low, high]."""
    draws = uniform(seed, Stream.MASK_RATE, epoch, index, 1)[:, 0]
    normal = NormalDist(mean, std)
    floor, ceiling = normal.cdf(low), normal.cdf(high)
    # Far from the mean, cdf rounds to 0 or 1, of which there is no inverse.
    shares = (floor + draws * (ceiling - floor)).clip(_LEAST, 1 - _LEAST)
    rate = np.array([normal.inv_cdf(share) for share in shares.tolist()]).clip(low, high)
    # A rate of exactly k / tokens must give k: the tolerance absorbs the rounding of the product.
    return np.ceil(rate * tokens - 1e-9).astype(np.int64)


_LEAST = 2.0**-53


def draw_masks(seed: int, epoch: IntArray, index: IntArray, counts: IntArray, tokens: int) -> npt.NDArray[np.bool_]:
    """Masks [B, tokens], True where masked, with exactly `counts` [B] masked patches per sample."""
    return draw_orders(seed, epoch, index, tokens).argsort(axis=1) < counts[:, None]


def draw_orders(seed: int, epoch: IntArray, index: IntArray, tokens: int) -> IntArray:
    """The order [B, tokens] in which patches are masked: a mask covers the first entries."""
    return uniform(seed, Stream.MASK_ORDER, epoch, index, tokens).argsort(axis=1)
