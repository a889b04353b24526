"""Scenes and their captions, by category. A caption determines its image: objects and places follow from its words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .drawings import CELL, COLOURED, COLOURS, NUMBER, THINGS, Look, sprites
from .places import ARRANGED, GROUPS, LAYOUTS, LEFT, PATCH, PLACE_WORDS, RELATIONS, RIGHT, SIZE, Place

MAX_WORDS = 25
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PLURALS = {
    "butterfly": "butterflies",
    "strawberry": "strawberries",
    "cactus": "cactuses",
    "bus": "buses",
    "fox": "foxes",
    "dress": "dresses",
    "fish": "fishes",
}


class Object(NamedTuple):
    look: Look
    place: Place


class Scene(NamedTuple):
    """Objects in the order of the caption's words; `phrasing` is the template of the relation in it, if any."""

    category: str
    caption: str
    objects: tuple[Object, ...]
    phrasing: str | None = None


def article(look: Look) -> str:
    """The look with its indefinite article: "an owl", "a red car"."""
    words = str(look)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(look: Look) -> str:
    thing = PLURALS.get(look.thing, f"{look.thing}s")
    return f"{look.colour} {thing}" if look.colour else thing


def quantity(look: Look, count: int) -> str:
    """The caption of `count` equal objects: "an owl", "two red cars"."""
    return article(look) if count == 1 else f"{NUMBERS[count]} {plural(look)}"


def listing(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def render(scene: Scene) -> np.ndarray:
    """The image, uint8 [SIZE, SIZE, 3]."""
    image = np.full((SIZE, SIZE, 3), 255, dtype=np.uint8)
    for look, (row, column) in scene.objects:
        image[row * PATCH : row * PATCH + CELL, column * PATCH : column * PATCH + CELL] = sprites()[NUMBER[look]]
    return image


def _things(draws: np.random.Generator, count: int, among: Sequence[str] = THINGS) -> list[Look]:
    return [Look(among[int(i)]) for i in draws.permutation(len(among))[:count]]


def _coloured(draws: np.random.Generator, count: int) -> list[Look]:
    """Looks with different things and different colours."""
    things = _things(draws, count, tuple(COLOURED))
    return [
        Look(thing, tuple(COLOURS)[i])
        for (thing, _), i in zip(things, draws.permutation(len(COLOURS))[:count], strict=True)
    ]


def _single(draws: np.random.Generator) -> Scene:
    (look,) = _things(draws, 1)
    return _equal("single", look, 1)


def _colour(draws: np.random.Generator) -> Scene:
    (look,) = _coloured(draws, 1)
    return _equal("colour", look, 1)


def _count(draws: np.random.Generator) -> Scene:
    (look,) = _things(draws, 1)
    return _equal("count", look, int(draws.integers(2, 5)))


def _equal(category: str, look: Look, count: int) -> Scene:
    return Scene(category, quantity(look, count), tuple(Object(look, place) for place in ARRANGED[count]))


def _two(draws: np.random.Generator) -> Scene:
    return _row("two", _things(draws, 2))


def _binding(draws: np.random.Generator) -> Scene:
    return _row("binding", _coloured(draws, 2))


def _row(category: str, looks: list[Look]) -> Scene:
    objects = tuple(map(Object, looks, (LEFT, RIGHT)))
    return Scene(category, listing([article(look) for look in looks]), objects)


def _position(draws: np.random.Generator) -> Scene:
    a, b = _things(draws, 2)
    relation = RELATIONS[tuple(RELATIONS)[draws.integers(len(RELATIONS))]]
    phrasing = relation.phrasings[draws.integers(len(relation.phrasings))]
    caption = phrasing.format(a=article(a), b=article(b), it="it", its="its")
    objects = (Object(a, relation.first), Object(b, relation.second))
    return Scene("position", caption, objects if phrasing.startswith("{a}") else objects[::-1], phrasing)


def _mixed(draws: np.random.Generator) -> Scene:
    """Relation, colour and number at once: two groups of one or two, at least one in colour."""
    name, m, n = key = tuple(GROUPS)[draws.integers(len(GROUPS))]
    a, b = _coloured(draws, 2)
    if draws.random() < 0.5:
        plain = _things(draws, 1, [thing for thing in THINGS if thing not in (a.thing, b.thing)])[0]
        a, b = (plain, b) if draws.random() < 0.5 else (a, plain)
    phrasings = RELATIONS[name].phrasings
    phrasing = phrasings[draws.integers(len(phrasings))]
    it, its = ("it", "its") if n == 1 else ("them", "their")
    caption = phrasing.format(a=quantity(a, m), b=quantity(b, n), it=it, its=its)
    groups = list(zip((a, b), GROUPS[key], strict=True))
    if phrasing.startswith("{b}"):
        groups.reverse()
    objects = [Object(look, place) for look, places in groups for place in places]
    return Scene("mixed", caption, tuple(objects), phrasing)


def _grid(draws: np.random.Generator) -> Scene:
    """Each object with its place, any of 3 x 3."""
    count = int(draws.integers(1, 5))
    layouts = [layout for layout in LAYOUTS if len(layout) == count]
    layout = layouts[draws.integers(len(layouts))]
    places = [layout[i] for i in draws.permutation(count)]
    looks = [
        Look(
            thing, tuple(COLOURS)[draws.integers(len(COLOURS))] if thing in COLOURED and draws.random() < 0.5 else None
        )
        for thing, _ in _things(draws, count)
    ]
    objects = tuple(map(Object, looks, places))
    return Scene("grid", listing([f"{article(look)} {PLACE_WORDS[place]}" for look, place in objects]), objects)


CATEGORIES: dict[str, Callable[[np.random.Generator], Scene]] = {
    "single": _single,
    "colour": _colour,
    "count": _count,
    "two": _two,
    "binding": _binding,
    "position": _position,
    "mixed": _mixed,
    "grid": _grid,
}
"""Category -> draws one of its scenes."""


def draw(category: str, draws: np.random.Generator) -> Scene:
    """A random scene of a category, with a caption of at most MAX_WORDS words."""
    while len((scene := CATEGORIES[category](draws)).caption.split()) > MAX_WORDS:
        pass
    return scene
