"""Drawings, captions and layouts of the scenes, and the questions about them."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from bifrost.data.openmoji import find_drawings
from bifrost.data.scenes.drawings import BARE, CELL, COLOURED, COLOURS, LOOKS, NATURAL, NUMBER, THINGS, Look, sprites
from bifrost.data.scenes.grammar import CATEGORIES, MAX_WORDS, Object, Scene, draw, render
from bifrost.data.scenes.places import BOTTOM, LAYOUTS, PATCH, PLACES, RELATIONS, SIZE, TOP_LEFT, TOP_RIGHT, separate
from bifrost.data.scenes.questions import Question, questions


def scenes(each: int = 40) -> list[Scene]:
    draws = np.random.default_rng(0)
    return [draw(category, draws) for category in CATEGORIES for _ in range(each)]


def test_there_are_enough_things_and_colours() -> None:
    assert len(THINGS) >= 64 and len(COLOURED) >= 24 and len(COLOURS) == 6
    assert not set(NATURAL) & set(COLOURED)
    assert {*NATURAL.values(), *COLOURED.values()} <= find_drawings().keys()
    assert len({*NATURAL.values(), *COLOURED.values()}) == len(THINGS)


def test_no_two_sprites_are_alike() -> None:
    rows = sprites().reshape(len(LOOKS), -1).astype(np.float32) / 255
    squares = np.square(rows).sum(axis=1)
    distance = (squares[:, None] + squares - 2 * rows @ rows.T) / rows.shape[1]
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > 0.003
    bare = sprites()[[NUMBER[Look(thing)] for thing in COLOURED]].astype(int)
    assert np.ptp(bare, axis=-1).max() <= 1, "grey"
    assert max(BARE) == min(BARE)


def test_sprites_are_bitwise_the_same_everywhere() -> None:
    assert sprites().shape == (len(LOOKS), CELL, CELL, 3)
    assert sprites()[:, [0, -1]].min() == 255, "white border"
    assert len(np.unique(sprites().reshape(len(LOOKS), -1), axis=0)) == len(LOOKS)


def test_captions_are_short_and_determine_the_image() -> None:
    images: dict[str, set[frozenset[Object]]] = {}
    for scene in scenes(300):
        assert len(scene.caption.split()) <= MAX_WORDS
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", scene.caption), scene.caption
        assert 1 <= len(scene.objects) <= 4
        images.setdefault(scene.caption, set()).add(frozenset(scene.objects))
    assert all(len(found) == 1 for found in images.values())
    assert max(len(caption.split()) for caption in images) > 20


def test_objects_are_on_the_grid_and_do_not_overlap() -> None:
    assert (SIZE, PATCH, CELL) == (112, 28, 56)
    assert Counter(map(len, LAYOUTS)) == {1: 9, 2: 16, 3: 8, 4: 1}
    for scene in scenes():
        places = [each.place for each in scene.objects]
        assert all(separate(*pair) for pair in combinations(places, 2))
        image = render(scene)
        blank = np.full((SIZE, SIZE), True)
        for row, column in places:
            blank[row * PATCH : row * PATCH + CELL, column * PATCH : column * PATCH + CELL] = False
        assert image[blank].size == 0 or image[blank].min() == 255
        assert all(image[r * PATCH : r * PATCH + CELL, c * PATCH : c * PATCH + CELL].min() < 100 for r, c in places)
    used = {each.place for scene in scenes(300) if scene.category == "grid" for each in scene.objects}
    assert used == set(PLACES)


def test_relations_are_where_they_say() -> None:
    for name, (first, second, phrasings) in RELATIONS.items():
        words = set(name.split())
        assert (first[0] < second[0]) == bool(words & {"above", "upper"})
        assert (first[0] > second[0]) == bool(words & {"below", "lower"})
        assert (first[1] < second[1]) == ("left" in words)
        assert (first[1] > second[1]) == ("right" in words)
        assert len(phrasings) == len(set(phrasings)) >= 3
    for scene in scenes():
        if scene.category in ("position", "mixed"):
            order = [scene.caption.find(each.look.thing) for each in scene.objects]
            assert order == sorted(order), "objects are in the order of the caption"
        if scene.category == "mixed":
            counts = Counter(each.look for each in scene.objects)
            assert len(counts) == 2 and max(counts.values()) == 2 and any(look.colour for look in counts)


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        (
            (Object(Look("apple"), (1, 2)), Object(Look("car", "red"), (1, 0))),
            [
                ("count", "how many apples are there?", "one"),
                ("relation", "what is left of the apple?", "a red car"),
                ("count", "how many cars are there?", "one"),
                ("colour", "what colour is the car?", "red"),
                ("relation", "what is right of the car?", "an apple"),
                ("place", "what is on the right?", "an apple"),
                ("place", "what is on the left?", "a red car"),
            ],
        ),
        (
            (*(Object(Look("fox"), place) for place in (TOP_LEFT, TOP_RIGHT)), Object(Look("gem"), BOTTOM)),
            [
                ("count", "how many foxes are there?", "two"),
                ("relation", "what is below the foxes?", "a gem"),
                ("count", "how many gems are there?", "one"),
                ("colour", "what colour is the gem?", "grey"),
                ("relation", "what is above the gem?", "two foxes"),
                ("place", "what is in the top left corner?", "a fox"),
                ("place", "what is in the top right corner?", "a fox"),
                ("place", "what is at the bottom?", "a gem"),
            ],
        ),
    ],
    ids=["pair", "groups"],
)
def test_questions_follow_from_the_objects(objects: tuple[Object, ...], expected: list[tuple[str, str, str]]) -> None:
    assert questions(Scene("", "", objects)) == [Question(*each) for each in expected]


def test_every_question_has_one_answer() -> None:
    for scene in scenes():
        asked = questions(scene)
        assert len({each.text for each in asked}) == len(asked) >= 2
        assert all(each.answer for each in asked)
