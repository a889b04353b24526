"""Where the objects of a scene are: 3 x 3 places, layouts of up to four objects, and relations with their phrasings.

An image of SIZE pixels is 4 x 4 patches. An object's cell covers 2 x 2 of them; its place is the (row, column) of the
first, in patches, so that neighbouring places overlap and a layout uses places two patches apart.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

from .drawings import CELL

SIZE, PATCH = 112, 28
Place = tuple[int, int]
CENTRE: Place = (1, 1)
TOP, BOTTOM, LEFT, RIGHT = (0, 1), (2, 1), (1, 0), (1, 2)
TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT = CORNERS = (0, 0), (0, 2), (2, 0), (2, 2)
PLACE_WORDS: dict[Place, str] = {
    TOP_LEFT: "in the top left corner",
    TOP: "at the top",
    TOP_RIGHT: "in the top right corner",
    LEFT: "on the left",
    CENTRE: "in the middle",
    RIGHT: "on the right",
    BOTTOM_LEFT: "in the bottom left corner",
    BOTTOM: "at the bottom",
    BOTTOM_RIGHT: "in the bottom right corner",
}
PLACES = tuple(PLACE_WORDS)
ARRANGED: dict[int, tuple[Place, ...]] = {
    1: (CENTRE,),
    2: (LEFT, RIGHT),
    3: (TOP, BOTTOM_LEFT, BOTTOM_RIGHT),
    4: CORNERS,
}
"""Number of equal objects -> their places."""


def separate(first: Place, second: Place) -> bool:
    """Whether the cells at two places do not overlap."""
    return max(abs(first[0] - second[0]), abs(first[1] - second[1])) * PATCH >= CELL


LAYOUTS = tuple(
    places
    for count in ARRANGED
    for places in combinations(PLACES, count)
    if all(separate(*pair) for pair in combinations(places, 2))
)
"""Every set of one to four places whose cells do not overlap, each in the order of PLACES."""


class Relation(NamedTuple):
    """Two places, the one of {a} first, and phrasings, of which the last is in no training caption: its words are, in
    other phrasings."""

    first: Place
    second: Place
    phrasings: tuple[str, ...]


def _lateral(side: str) -> tuple[str, ...]:
    return (
        f"{{a}} to the {side} of {{b}}",
        f"{{a}} {side} of {{b}}",
        f"{{b}} with {{a}} on {{its}} {side}",
        f"{{b}} with {{a}} to {{its}} {side}",
    )


def _vertical(word: str, synonym: str) -> tuple[str, ...]:
    return (
        f"{{a}} {word} {{b}}",
        f"{{a}} {synonym} {{b}}",
        f"{{b}} with {{a}} {word} {{it}}",
        f"{{b}} with {{a}} {synonym} {{it}}",
    )


RELATIONS = {
    "left": Relation(LEFT, RIGHT, _lateral("left")),
    "right": Relation(RIGHT, LEFT, _lateral("right")),
    "above": Relation(TOP, BOTTOM, _vertical("above", "over")),
    "below": Relation(BOTTOM, TOP, _vertical("below", "under")),
    "upper left": Relation(TOP_LEFT, BOTTOM_RIGHT, _lateral("upper left")),
    "upper right": Relation(TOP_RIGHT, BOTTOM_LEFT, _lateral("upper right")),
    "lower left": Relation(BOTTOM_LEFT, TOP_RIGHT, _lateral("lower left")),
    "lower right": Relation(BOTTOM_RIGHT, TOP_LEFT, _lateral("lower right")),
}
HELD_OUT_PHRASINGS = frozenset(relation.phrasings[-1] for relation in RELATIONS.values())
_ORDERED: dict[tuple[str, int, int], tuple[tuple[Place, ...], tuple[Place, ...]]] = {
    ("left", 1, 2): ((LEFT,), (TOP_RIGHT, BOTTOM_RIGHT)),
    ("left", 2, 1): ((TOP_LEFT, BOTTOM_LEFT), (RIGHT,)),
    ("left", 2, 2): ((TOP_LEFT, BOTTOM_LEFT), (TOP_RIGHT, BOTTOM_RIGHT)),
    ("above", 1, 2): ((TOP,), (BOTTOM_LEFT, BOTTOM_RIGHT)),
    ("above", 2, 1): ((TOP_LEFT, TOP_RIGHT), (BOTTOM,)),
    ("above", 2, 2): ((TOP_LEFT, TOP_RIGHT), (BOTTOM_LEFT, BOTTOM_RIGHT)),
}
_OPPOSITE = {"left": "right", "above": "below"}
GROUPS = {
    **_ORDERED,
    **{(_OPPOSITE[name], n, m): (second, first) for (name, m, n), (first, second) in _ORDERED.items()},
}
"""Relation of two groups and their sizes -> the places of both."""
