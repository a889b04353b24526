"""Read the objects of scenes back from pixels, by template matching, and compare them with the ground truth.

In every cell each sprite is matched at shifts of up to SHIFT pixels with the contrast (a factor on the difference from
white, within CONTRAST) that fits best. The layout that explains most of the image's energy is chosen.

Legend: n images, P places, L looks, K shifts, C = 3 * (CELL / SCALE)^2 values of a cell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from .drawings import CELL, LOOKS, Look, sprites
from .grammar import Object, Scene
from .places import LAYOUTS, PATCH, PLACES, SIZE, Place

SHIFT = 2
SCALE = 2  # pixels per matched value: an image is compared at half its resolution
CONTRAST = (0.4, 1.25)
BLUR = 1.5  # pixels; images that are blurred slightly are then like the sprites
BACKGROUND = 3  # percentile of the differences from white that is the background
CHUNK = 64  # images matched at once


class Found(NamedTuple):
    """An image's objects, and for every place the look that fits it best, whether or not an object is there."""

    objects: tuple[Object, ...]
    nearest: dict[Place, Look]


class Score(NamedTuple):
    """Of one image: `everything`: exactly the scene's objects at their places. `set`: the right objects, at any places.
    `layout`: objects at the right places, of any look. `objects`: fraction of the scene's objects whose place shows
    them, whatever the layout."""

    everything: bool
    set: bool
    layout: bool
    objects: float


def read(images: np.ndarray | Sequence[Image.Image]) -> list[Found]:
    """The objects in square images: uint8 [n, S, S, 3], or Pillow images, of any size S."""
    gain, nearest = _matches(images)
    layouts = np.zeros((len(LAYOUTS), len(PLACES)), dtype=np.float32)
    for row, layout in enumerate(LAYOUTS):
        layouts[row, [PLACES.index(place) for place in layout]] = 1
    chosen = (gain @ layouts.T).argmax(axis=1)
    found = []
    for image, row in enumerate(chosen):
        looks = {place: LOOKS[nearest[image, column]] for column, place in enumerate(PLACES)}
        found.append(Found(tuple(Object(looks[place], place) for place in LAYOUTS[row]), looks))
    return found


def score(found: Found, scene: Scene) -> Score:
    """Compare what was read with the ground truth."""
    looks, places = (Counter(getattr(each, field) for each in found.objects) for field in Object._fields)
    right = [found.nearest[each.place] == each.look for each in scene.objects]
    return Score(
        set(found.objects) == set(scene.objects),
        looks == Counter(each.look for each in scene.objects),
        places == Counter(each.place for each in scene.objects),
        sum(right) / len(right),
    )


def summary(scores: Iterable[Score]) -> dict[str, float]:
    """Number and means: {n, all, set, layout, objects}."""
    rows = list(scores)
    means = np.array(rows, dtype=float).mean(axis=0) if rows else [float("nan")] * len(Score._fields)
    return {"n": len(rows), **{key: float(mean) for key, mean in zip(("all", *Score._fields[1:]), means, strict=True)}}


def score_images(images: np.ndarray | Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """`summarize` what is read from the images."""
    return summarize(read(images), scenes)


def summarize(found: Iterable[Found], scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """`summary` for every category of the scenes, in their order."""
    by_category: dict[str, list[Score]] = {}
    for one, scene in zip(found, scenes, strict=True):
        by_category.setdefault(scene.category, []).append(score(one, scene))
    return {category: summary(scores) for category, scores in by_category.items()}


@cache
def _templates() -> np.ndarray:
    """Ink of the sprites in a cell, [L, C]."""
    room = np.pad(sprites(), ((0, 0), (CELL // 2,) * 2, (CELL // 2,) * 2, (0, 0)), constant_values=255)
    start, side = CELL // 2 // SCALE, CELL // SCALE
    return _ink(room)[:, start : start + side, start : start + side].reshape(len(room), -1)


def _matches(images: np.ndarray | Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """The energy that the best look explains, at the best shift, and the look's number, both [n, P]."""
    templates = _templates()
    energy = np.square(templates).sum(axis=1)
    gains, looks = [], []
    for start in range(0, len(images), CHUNK):
        cells = _cells(_ink(images[start : start + CHUNK]))  # [n, P, K, C]
        n, places, shifts, _ = cells.shape
        product = cells.reshape(n * places * shifts, -1) @ templates.T
        contrast = np.clip(product / energy, *CONTRAST)
        gain = (2 * contrast * product - contrast**2 * energy).reshape(n, places, shifts, -1).max(axis=2)
        gains.append(gain.max(axis=2))
        looks.append(gain.argmax(axis=2))
    return np.concatenate(gains), np.concatenate(looks)


def _ink(images: np.ndarray | Sequence[Image.Image]) -> np.ndarray:
    """Differences from the background, 0 .. 1, at SIZE / SCALE pixels, slightly blurred: [n, S, S, 3]."""
    small = []
    for each in images:
        image = each if isinstance(each, Image.Image) else Image.fromarray(each)
        image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        small.append(np.asarray(image.filter(ImageFilter.GaussianBlur(BLUR)).reduce(SCALE)))
    ink = 1 - np.stack(small).astype(np.float32) / 255
    return ink - np.percentile(ink, BACKGROUND, axis=(1, 2), keepdims=True).astype(np.float32)


def _cells(ink: np.ndarray) -> np.ndarray:
    """Every place's cell at every shift, [n, P, K, C]."""
    border = SHIFT // SCALE
    ink = np.pad(ink, ((0, 0), (border,) * 2, (border,) * 2, (0, 0)))
    side, step, shifts = CELL // SCALE, PATCH // SCALE, 2 * (SHIFT // SCALE) + 1
    windows = np.lib.stride_tricks.sliding_window_view(ink, (side, side), axis=(1, 2))  # [n, Y, X, 3, side, side]
    cells = [
        windows[:, row * step + dy, column * step + dx].transpose(0, 2, 3, 1).reshape(len(ink), -1)
        for row, column in PLACES
        for dy in range(shifts)
        for dx in range(shifts)
    ]
    return np.stack(cells, axis=1).reshape(len(ink), len(PLACES), shifts**2, -1)
