"""The scorer's own figures: on true renders, wrong ones, and images that are degraded as a generator's may be."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bifrost.data.scenes.drawings import LOOKS, Look
from bifrost.data.scenes.grammar import Object, Scene, render
from bifrost.data.scenes.places import BOTTOM, CENTRE, LAYOUTS, LEFT, RIGHT, TOP
from bifrost.data.scenes.scorer import Score, read, score, score_images

spec = importlib.util.spec_from_file_location("make_scenes", Path(__file__).parents[3] / "docs" / "make_scenes.py")
assert spec and spec.loader
page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page)

SCENES = page.measured_scenes(4)
LEAST = {
    "noise of standard deviation 0.4": 0.7,
    "Gaussian blur, radius 4 px": 0.8,
    "shifted by (4, 4) px": 0.9,
    "half true, half the mean of all images": 0.6,
    "another scene's image": 0,
}
"""Of degradations beyond those that the scorer is made for; all others are read."""


@pytest.mark.parametrize("name", page.DEGRADED)
def test_degraded_renders_are_read(name: str) -> None:
    found = page.figures(page.DEGRADED[name], SCENES)
    assert found["all"] >= LEAST.get(name, 0.97)
    assert found["n"] == len(SCENES)


def test_every_look_is_read_as_itself() -> None:
    scenes = [Scene("single", str(look), (Object(look, CENTRE),)) for look in LOOKS]
    assert [found.objects for found in read([Image.fromarray(render(each)) for each in scenes])] == [
        each.objects for each in scenes
    ]


def test_every_layout_is_read() -> None:
    looks = [Look("cat"), Look("car", "red"), Look("bus"), Look("gem", "blue")]
    scenes = [Scene("grid", "", tuple(map(Object, looks, layout))) for layout in LAYOUTS]
    assert [set(found.objects) for found in read(np.stack(list(map(render, scenes))))] == [
        set(each.objects) for each in scenes
    ]


def test_objects_set_and_layout_are_counted_apart() -> None:
    cat, dog, red, blue = Look("cat"), Look("dog"), Look("car", "red"), Look("car", "blue")
    scene = Scene("two", "a cat and a dog", (Object(cat, LEFT), Object(dog, RIGHT)))

    def against(*objects: Object) -> Score:
        return score(read(render(Scene("", "", objects))[None])[0], scene)

    assert against(*scene.objects) == Score(True, True, True, 1.0)
    assert against(*scene.objects[::-1]) == Score(True, True, True, 1.0), "the order has no meaning"
    assert against(Object(dog, LEFT), Object(cat, RIGHT)) == Score(False, True, True, 0.0)
    assert against(Object(cat, TOP), Object(dog, BOTTOM))[:3] == (False, True, False)
    assert against(Object(cat, LEFT), Object(red, RIGHT)) == Score(False, False, True, 0.5)
    assert against(Object(cat, LEFT)) == Score(False, False, False, 0.5)
    car = Scene("colour", "a red car", (Object(red, CENTRE),))
    assert score(read(render(car._replace(objects=(Object(blue, CENTRE),)))[None])[0], car) == (False, False, True, 0.0)


def test_wrong_images_score_nothing() -> None:
    assert page.figures(page.DEGRADED["another scene's image"], SCENES)["all"] <= 0.02
    assert page.figures(lambda images: np.full_like(images, 255), SCENES)["all"] == 0
    assert page.figures(lambda images: page.noise(0.3, np.full_like(images, 127)), SCENES)["all"] == 0


def test_the_summary_is_by_category() -> None:
    found = score_images(np.stack(list(map(render, SCENES))), SCENES)
    assert list(found) == list(dict.fromkeys(scene.category for scene in SCENES))
    assert sum(each["n"] for each in found.values()) == len(SCENES)
    assert all(each == {"n": each["n"], "all": 1, "set": 1, "layout": 1, "objects": 1} for each in found.values())
