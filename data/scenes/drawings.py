"""The drawings of the scenes: 68 things, 28 of them in six colours, each as a sprite of CELL pixels.

A sprite is an OpenMoji drawing cropped to its ink and resized to the cell less a margin. A thing that comes in colours
is grey without one, so that no two sprites of a thing are alike.
"""

from __future__ import annotations

import io
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..openmoji import find_drawings, render

CELL, MARGIN = 56, 2
"""Side in pixels of an object's cell, and the white border in it."""
RENDERED = 256
WHITENING = 4  # light shades of the fill keep the colour, white stays white
INK = 250  # a pixel is ink where its darkest channel is below this
COLOURS = {
    "red": (215, 35, 35),
    "yellow": (250, 210, 30),
    "green": (40, 150, 60),
    "blue": (30, 110, 240),
    "purple": (125, 35, 185),
    "pink": (250, 150, 205),
}
BARE = (145, 145, 145)
COLOURED = {
    "car": "automobile",
    "heart": "heart suit",
    "balloon": "balloon",
    "bell": "bell",
    "shirt": "t-shirt",
    "dress": "dress",
    "umbrella": "umbrella",
    "star": "star",
    "book": "closed book",
    "cap": "billed cap",
    "backpack": "backpack",
    "purse": "purse",
    "phone": "telephone",
    "gem": "gem stone",
    "drop": "droplet",
    "shield": "shield",
    "bucket": "bucket",
    "boot": "woman\u2019s boot",
    "teapot": "teapot",
    "glove": "boxing glove",
    "kite": "kite",
    "lock": "locked",
    "tag": "label",
    "fish": "fish",
    "crown": "crown",
    "scarf": "scarf",
    "puzzle": "puzzle piece",
    "moon": "crescent moon",
}
"""Thing that comes in colours -> name of its drawing."""
NATURAL = {
    "cat": "cat face",
    "dog": "dog face",
    "frog": "frog",
    "owl": "owl",
    "bee": "honeybee",
    "snail": "snail",
    "turtle": "turtle",
    "butterfly": "butterfly",
    "crab": "crab",
    "penguin": "penguin",
    "rabbit": "rabbit face",
    "pig": "pig face",
    "bear": "bear",
    "fox": "fox",
    "duck": "duck",
    "apple": "red apple",
    "banana": "banana",
    "lemon": "lemon",
    "carrot": "carrot",
    "mushroom": "mushroom",
    "pizza": "pizza",
    "hamburger": "hamburger",
    "cake": "birthday cake",
    "strawberry": "strawberry",
    "pineapple": "pineapple",
    "tree": "evergreen tree",
    "cactus": "cactus",
    "sunflower": "sunflower",
    "sun": "sun with face",
    "bus": "bus",
    "bicycle": "bicycle",
    "rocket": "rocket",
    "boat": "sailboat",
    "house": "house",
    "clock": "alarm clock",
    "guitar": "guitar",
    "drum": "drum",
    "gift": "wrapped gift",
    "robot": "robot",
    "camera": "camera",
}
"""Thing in the colours of its drawing -> name of its drawing."""
THINGS = (*NATURAL, *COLOURED)


class Look(NamedTuple):
    """What an object looks like: a thing, and its colour or None."""

    thing: str
    colour: str | None = None

    def __str__(self) -> str:
        return f"{self.colour} {self.thing}" if self.colour else self.thing


LOOKS = (*map(Look, THINGS), *(Look(thing, colour) for thing in COLOURED for colour in COLOURS))
NUMBER = {look: number for number, look in enumerate(LOOKS)}
"""Look -> its row in `sprites()`."""


@cache
def sprites() -> np.ndarray:
    """The sprites of LOOKS in order, uint8 [looks, CELL, CELL, 3]."""
    drawings = find_drawings()
    cells: dict[Look, np.ndarray] = {}
    for thing, name in {**NATURAL, **COLOURED}.items():
        ink = _cropped(Image.open(io.BytesIO(render(drawings[name], RENDERED))).convert("RGB"))
        if thing in NATURAL:
            cells[Look(thing)] = _cell(ink)
            continue
        cells[Look(thing)] = _cell(_tinted(ink, BARE))
        for colour, rgb in COLOURS.items():
            cells[Look(thing, colour)] = _cell(_tinted(ink, rgb))
    stacked = np.stack([cells[look] for look in LOOKS])
    stacked.setflags(write=False)
    return stacked


def _cropped(image: Image.Image) -> Image.Image:
    """The smallest square around the ink, centred."""
    rows, columns = np.nonzero(np.asarray(image).min(axis=2) < INK)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    side = max(bottom - top, right - left)
    square = Image.new("RGB", (side, side), "white")
    place = ((side - (right - left)) // 2, (side - (bottom - top)) // 2)
    square.paste(image.crop((left, top, right, bottom)), place)
    return square


def _tinted(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image with every hue replaced: black and white stay, the median luminance of the fill becomes `colour`."""
    pixels = np.asarray(image, dtype=np.float64) / 255
    light = pixels @ (0.299, 0.587, 0.114)
    fill = float(np.clip(np.median(light[(light > 0.15) & (light < 0.97)]), 0.3, 0.8))
    tone = np.array(colour) / 255
    below, above = light[..., None] / fill, np.maximum(light[..., None] - fill, 0) / (1 - fill)
    return Image.fromarray(
        (np.where(below < 1, below * tone, tone + above**WHITENING * (1 - tone)) * 255).round().astype(np.uint8)
    )


def _cell(image: Image.Image) -> np.ndarray:
    side = CELL - 2 * MARGIN
    cell = Image.new("RGB", (CELL, CELL), "white")
    cell.paste(image.resize((side, side), Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    return np.asarray(cell)
