"""The combinations that no training set contains, by a rule, and the scenes of both parts.

Held out are a fifth of the unordered pairs of things, of (thing, number) and of (colour, thing), and one phrasing of
each relation: pairs by the hash of their names, the others by the order of the things' hashes, so that every thing
lacks one or two colours and at most one number, and every colour and number about as many things. The rule applies to
all categories: two things that are held out as a pair are never together in a training image, whatever its caption is.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cache
from itertools import combinations

import numpy as np

from .drawings import COLOURED, COLOURS, THINGS
from .grammar import CATEGORIES, Scene, draw
from .places import HELD_OUT_PHRASINGS

FIFTH = 5
Combination = tuple[str, ...]
"""("pair", thing, thing) in alphabetical order, ("count", thing, number), ("colour", colour, thing) or ("phrasing",
template)."""
MIX = {
    "single": 0.04,
    "colour": 0.12,
    "count": 0.12,
    "two": 0.06,
    "binding": 0.28,
    "position": 0.18,
    "mixed": 0.10,
    "grid": 0.10,
}
"""Share of each category in the training scenes; colour and binding are 40 %."""
HELD_OUT = {
    "two": ("two", {"pair"}),
    "position": ("position", {"pair"}),
    "phrasing": ("position", {"phrasing"}),
    "count": ("count", {"count"}),
    "binding": ("binding", {"pair"}),
    "unseen_colour": ("binding", {"colour"}),
    "colour": ("colour", {"colour"}),
    "mixed": ("mixed", {"pair"}),
    "grid": ("grid", {"pair"}),
}
"""Category of held-out scenes -> the category that they are drawn from, and the only kinds of combination that are
held out in them."""
HELD_OUT_EDITS: dict[str, tuple[set[str], set[str]]] = {"recolour": (set(), {"colour"}), "remove": ({"pair"}, set())}
"""Kind of edit -> the kinds of combination that are held out in the source and in the target of held-out pairs."""
CATEGORY_NAMES = tuple(dict.fromkeys((*CATEGORIES, *HELD_OUT, *HELD_OUT_EDITS)))
"""Of training and of held-out scenes, and of the targets of edits."""
ATTEMPTS = 2000


def combinations_of(scene: Scene) -> set[Combination]:
    """What the scene combines, apart from places."""
    counts = Counter(each.look.thing for each in scene.objects)
    found: set[Combination] = {("pair", *pair) for pair in combinations(sorted(counts), 2)}
    found |= {("count", thing, str(count)) for thing, count in counts.items() if count > 1}
    found |= {("colour", each.look.colour, each.look.thing) for each in scene.objects if each.look.colour}
    if scene.phrasing:
        found.add(("phrasing", scene.phrasing))
    return found


def is_held_out(combination: Combination) -> bool:
    """The rule."""
    if combination[0] == "phrasing":
        return combination[1] in HELD_OUT_PHRASINGS
    if combination[0] == "colour":
        return combination[1:] in _held_out_colourings()
    if combination[0] == "count":
        return combination[1:] in _held_out_counts()
    return _hash(*combination) % FIFTH == 0


def _hash(*words: str) -> int:
    return int(hashlib.md5(" ".join(words).encode()).hexdigest(), 16)


@cache
def _held_out_colourings() -> frozenset[tuple[str, str]]:
    colours = tuple(COLOURS)
    found = set()
    for order, thing in enumerate(sorted(COLOURED, key=_hash)):
        found.add((colours[order % len(colours)], thing))
        if order % FIFTH == 0:  # a sixth and a fifth of a sixth are a fifth
            found.add((colours[(order + len(colours) // 2) % len(colours)], thing))
    return frozenset(found)


@cache
def _held_out_counts() -> frozenset[tuple[str, str]]:
    found = ((thing, order) for order, thing in enumerate(sorted(THINGS, key=_hash)))
    return frozenset(
        (thing, str(2 + order % 3)) for thing, order in found if order % FIFTH < 3
    )  # three fifths of a third


def held_out_in(scene: Scene) -> set[Combination]:
    """The scene's held-out combinations; a training scene has none."""
    return set(filter(is_held_out, combinations_of(scene)))


def training_scenes(total: int, seed: int, mix: dict[str, float] = MIX) -> list[Scene]:
    """About `total` scenes without a held-out combination, shuffled, in the proportions of `mix`. A category with fewer
    captions repeats all of them equally often."""
    draws = np.random.default_rng(seed)
    found: list[Scene] = []
    for category, share in mix.items():
        wanted = round(total * share)
        distinct = _distinct(category, set(), wanted, draws)
        found += (distinct * (wanted // len(distinct) + 1))[:wanted]
    return [found[i] for i in draws.permutation(len(found))]


def heldout_scenes(each: int, seed: int) -> list[Scene]:
    """Up to `each` scenes for every category of HELD_OUT, with distinct captions; the category is its key there."""
    draws = np.random.default_rng(seed)
    return [
        scene._replace(category=name)
        for name, (category, kinds) in HELD_OUT.items()
        for scene in _distinct(category, kinds, each, draws)
    ]


def _distinct(category: str, kinds: set[str], count: int, draws: np.random.Generator) -> list[Scene]:
    """Up to `count` scenes with distinct captions and held-out combinations of exactly these kinds; fewer if ATTEMPTS
    draws in a row give none."""
    found: dict[str, Scene] = {}
    misses = 0
    while len(found) < count and misses < ATTEMPTS:
        scene = draw(category, draws)
        if scene.caption in found or {kind for kind, *_ in held_out_in(scene)} != kinds:
            misses += 1
            continue
        misses = 0
        found[scene.caption] = scene
    return list(found.values())
