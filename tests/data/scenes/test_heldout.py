"""The held-out rule, and that no training set contains what it holds out."""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from bifrost.data import open_dataset
from bifrost.data.demo import make_demo
from bifrost.data.errors import DataError
from bifrost.data.scenes import heldout
from bifrost.data.scenes.drawings import COLOURED, COLOURS, THINGS
from bifrost.data.scenes.grammar import PLURALS
from bifrost.data.scenes.heldout import HELD_OUT, MIX, heldout_scenes, is_held_out, training_scenes
from bifrost.data.scenes.key import read_key, to_json
from bifrost.data.scenes.places import HELD_OUT_PHRASINGS, RELATIONS

THING = {PLURALS.get(thing, f"{thing}s"): thing for thing in THINGS} | {thing: thing for thing in THINGS}
PLACE_WORDS = {"left", "right", "above", "below", "over", "under", "top", "bottom", "middle", "corner"}
ROOT = Path(__file__).parents[3]
NUMBERS = {"two": 2, "three": 3, "four": 4}


def leaks(caption: str) -> set[tuple[str, ...]]:
    """Held-out pairs, numbers and colourings that are named in a caption, found from its words alone."""
    named: list[tuple[str, str | None, int]] = []
    words = re.findall(r"\w+", caption)
    for at, word in enumerate(words):
        if word in THING:
            colour = words[at - 1] if words[at - 1] in COLOURS else None
            number = words[at - 2] if colour else words[at - 1]
            named.append((THING[word], colour, NUMBERS.get(number, 1)))
    return {each for each in combinations_of(named) if is_held_out(each)}


def combinations_of(named: list[tuple[str, str | None, int]]) -> set[tuple[str, ...]]:
    """The pairs, numbers and colourings of things with their colours and numbers."""
    found: set[tuple[str, ...]] = {("pair", *sorted(pair)) for pair in combinations([thing for thing, *_ in named], 2)}
    found |= {("count", thing, str(number)) for thing, _, number in named if number > 1}
    return found | {("colour", colour, thing) for thing, colour, _ in named if colour}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bifrost.data.demo.TRAINING_SCENES", 1500)
        patch.setattr("bifrost.data.demo.HELD_OUT_SCENES", 20)
        assert make_demo(out, "scenes").fresh
        assert not make_demo(out, "scenes").fresh
        with pytest.raises(DataError, match="belongs to another dataset; name an empty folder"):
            make_demo(out, "drawings")
    return out


def captions(demo: Path, part: str) -> dict[str, str]:
    dataset = open_dataset(str(demo / f"{part}-*.tar"))
    raw = [dataset.read(shard, n) for shard, count in enumerate(dataset.samples_per_shard) for n in range(count)]
    return {each.key: each.caption for each in raw}


def test_no_training_caption_of_the_demo_leaks(demo: Path) -> None:
    train = captions(demo, "train")
    assert len(train) == 1500
    assert {caption: found for caption in train.values() if (found := leaks(caption))} == {}
    assert all(not is_held_out(("phrasing", scene.phrasing or "")) for scene in training_scenes(1500, 0))


@pytest.mark.parametrize(
    "mix", [{"single": 0.3, "two": 0.3, "grid": 0.4}, dict.fromkeys(MIX, 0.125)], ids=["few", "all"]
)
@pytest.mark.parametrize("seed", [3, 4])
def test_no_training_set_of_another_mix_leaks(mix: dict[str, float], seed: int) -> None:
    assert not any(leaks(scene.caption) for scene in training_scenes(800, seed, mix))


@pytest.mark.parametrize("kind", ["scenes", "sprites"])
def test_no_scene_of_the_small_flux_leaks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the MLLM are `training_scenes` of two seeds. FLUX's are rearranged, and captioned by other words."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "foundations")
    flux = importlib.import_module("flux_data")
    draws = np.random.default_rng(0)
    scenes = flux.flux_scenes(1000, 5) if kind == "scenes" else flux.sprite_scenes()
    assert {scene.caption: found for scene in scenes if (found := leaks(scene.caption))} == {}
    for scene in scenes:
        text, _ = flux.listed(scene, draws)
        numbers = Counter(each.look for each in scene.objects)
        shown = [(look.thing, look.colour, number) for look, number in numbers.items()]
        assert not any(map(is_held_out, combinations_of(shown))), text
        assert not leaks(text) and not set(text.split()) & PLACE_WORDS, text


def test_a_rule_without_effect_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heldout, "is_held_out", lambda combination: False)
    scenes = training_scenes(600, 0)
    assert {kind for scene in scenes for kind, *_ in leaks(scene.caption)} == {"pair", "count", "colour"}


def test_every_held_out_scene_has_what_its_category_holds_out(demo: Path) -> None:
    held = {key: scene for key, scene in read_key(demo / "KEY.json").items() if key.startswith("heldout")}
    assert {key: scene.caption for key, scene in held.items()} == captions(demo, "heldout")
    assert Counter(scene.category for scene in held.values()) == dict.fromkeys(HELD_OUT, 20)
    for scene in held.values():
        kinds = {kind for kind, *_ in leaks(scene.caption)}
        if scene.phrasing in HELD_OUT_PHRASINGS:
            kinds.add("phrasing")
        assert kinds == HELD_OUT[scene.category][1], scene


def test_a_fifth_of_the_combinations_is_held_out() -> None:
    pairs = [("pair", *pair) for pair in combinations(sorted(THINGS), 2)]
    counts = [("count", thing, str(number)) for thing in THINGS for number in (2, 3, 4)]
    colourings = [("colour", colour, thing) for thing in COLOURED for colour in COLOURS]
    for kind in (pairs, counts, colourings):
        assert sum(map(is_held_out, kind)) / len(kind) == pytest.approx(0.2, abs=0.015)
    assert max(Counter(each[1] for each in filter(is_held_out, counts)).values()) == 1, "every plural is seen"
    out = list(filter(is_held_out, colourings))
    assert len(out) >= 20
    assert all(1 <= sum(each[2] == thing for each in out) <= 2 for thing in COLOURED)
    assert all(5 <= sum(each[1] == colour for each in out) <= 6 for colour in COLOURS)
    first = [pair[1:] for pair in filter(is_held_out, pairs)][:3]
    assert first == [("apple", "balloon"), ("apple", "bucket"), ("apple", "car")], "md5 is the same everywhere"


def test_words_of_held_out_phrasings_are_in_training_captions() -> None:
    taught = {
        word for relation in RELATIONS.values() for phrasing in relation.phrasings[:-1] for word in phrasing.split()
    }
    assert {word for phrasing in HELD_OUT_PHRASINGS for word in phrasing.split()} <= taught
    assert len(HELD_OUT_PHRASINGS) == len(RELATIONS)


def test_mix_and_determinism() -> None:
    assert sum(MIX.values()) == pytest.approx(1)
    assert MIX["colour"] + MIX["binding"] == pytest.approx(0.4)
    scenes = training_scenes(400, 7)
    assert scenes == training_scenes(400, 7) != training_scenes(400, 8)
    assert heldout_scenes(5, 1) == heldout_scenes(5, 1)
    assert Counter(scene.category for scene in scenes) == {name: round(400 * share) for name, share in MIX.items()}


def test_a_file_that_is_not_a_key_is_one_line(tmp_path: Path) -> None:
    whole = json.loads(to_json({"train0": training_scenes(20, 0)[0]}))
    unknown = [{**whole["train0"]["objects"][0], **change} for change in ({"thing": "unicorn"}, {"row": 3})]
    parts = [
        {"category": "single"},
        *({**whole["train0"], "objects": objects} for objects in ([], *([o] for o in unknown))),
    ]
    for text in ("[]", "{", "\0", *(json.dumps({"train0": part}) for part in parts)):
        (tmp_path / "KEY.json").write_text(text)
        with pytest.raises(DataError, match=r"^.*KEY.json: not the ground truth of scenes \(.*\); give the KEY.json"):
            read_key(tmp_path / "KEY.json")
    with pytest.raises(DataError, match="No such file"):
        read_key(tmp_path / "none.json")
