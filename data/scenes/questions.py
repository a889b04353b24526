"""Questions about a scene with their answers, from its ground truth."""

from __future__ import annotations

from typing import NamedTuple

from .drawings import COLOURED, Look
from .grammar import NUMBERS, Scene, article, plural, quantity
from .places import PLACE_WORDS, Place

DIRECTIONS = {
    (0, -1): "left of",
    (0, 1): "right of",
    (-1, 0): "above",
    (1, 0): "below",
    (-1, -1): "to the upper left of",
    (-1, 1): "to the upper right of",
    (1, -1): "to the lower left of",
    (1, 1): "to the lower right of",
}
"""(row, column) direction from an object to another -> words for the other's place."""
BARE_COLOUR = "grey"


class Question(NamedTuple):
    """kind: "relation", "count", "colour" or "place"."""

    kind: str
    text: str
    answer: str


def questions(scene: Scene) -> list[Question]:
    """Every question of the four kinds that has exactly one answer."""
    groups: dict[Look, list[Place]] = {}
    for look, place in scene.objects:
        groups.setdefault(look, []).append(place)
    found = []
    for look, places in groups.items():
        count = len(places)
        verb, name = ("is", look.thing) if count == 1 else ("are", plural(Look(look.thing)))
        found.append(Question("count", f"how many {plural(Look(look.thing))} are there?", NUMBERS[count]))
        if look.thing in COLOURED:
            found.append(Question("colour", f"what colour {verb} the {name}?", look.colour or BARE_COLOUR))
        if len(groups) > 1:
            around = [(direction(places, others), other) for other, others in groups.items() if other != look]
            for words in DIRECTIONS.values():
                there = [other for found_words, other in around if found_words == words]
                if len(there) == 1:
                    answer = quantity(there[0], len(groups[there[0]]))
                    found.append(Question("relation", f"what is {words} the {name}?", answer))
    found += [Question("place", f"what is {PLACE_WORDS[each.place]}?", article(each.look)) for each in scene.objects]
    return found


def direction(start: list[Place], end: list[Place]) -> str | None:
    """Words for where the group at `end` is, seen from the group at `start`; None between the eight directions."""
    rows, columns = (
        sum(place[axis] for place in end) / len(end) - sum(place[axis] for place in start) / len(start)
        for axis in (0, 1)
    )
    if rows and columns and abs(rows) != abs(columns):
        return None
    return DIRECTIONS[(rows > 0) - (rows < 0), (columns > 0) - (columns < 0)]
