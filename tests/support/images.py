"""Comparisons of 8-bit images."""

from __future__ import annotations

import numpy as np
from PIL import Image


def equal(one: Image.Image, other: Image.Image, levels: int = 1) -> bool:
    difference = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))
    return difference.max() <= levels


def differ(one: Image.Image, other: Image.Image) -> bool:
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).mean() > 1
