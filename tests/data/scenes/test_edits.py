"""Editing pairs: what a second implementation makes of the source's pixels and the instruction is the target, and no
training pair has what held-out ones ask for."""

from __future__ import annotations

import io
import re
import tarfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bifrost.data import verify
from bifrost.data.demo import SAMPLES_PER_SHARD, make_demo
from bifrost.data.scenes.drawings import CELL, COLOURS, LOOKS, Look, sprites
from bifrost.data.scenes.edits import Edit, heldout_edits, training_edits
from bifrost.data.scenes.grammar import render
from bifrost.data.scenes.heldout import is_held_out
from bifrost.data.scenes.key import read_key
from bifrost.data.scenes.places import PATCH, PLACES

Pair = dict[str, bytes]
RECOLOUR, REMOVE = r"make the (\w+ )?(\w+) (\w+)", r"remove the (\w+ )?(\w+)"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("edits")
    make(out)
    return out


def make(out: Path) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bifrost.data.demo.TRAINING_EDITS", 240)
        patch.setattr("bifrost.data.demo.HELD_OUT_EDITS", 20)
        patch.setitem(SAMPLES_PER_SHARD, "edits", 120)
        return make_demo(out, "edits").fresh


def pairs(demo: Path) -> dict[str, Pair]:
    """Key -> extension -> content, as the tars have them."""
    found: dict[str, Pair] = {}
    for path in sorted(demo.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                file = tar.extractfile(member)
                assert file and kind not in found.get(key, {})
                found.setdefault(key, {})[kind] = file.read()
    return found


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def cell(place: tuple[int, int]) -> tuple[slice, slice]:
    top, left = (PATCH * at for at in place)
    return slice(top, top + CELL), slice(left, left + CELL)


def edited(source: np.ndarray, instruction: str) -> np.ndarray:
    """The source with the instruction applied to the one cell that shows what it names."""
    sprite = dict(zip(map(str, LOOKS), sprites(), strict=True))
    words = re.fullmatch(RECOLOUR, instruction) or re.fullmatch(REMOVE, instruction)
    assert words, instruction
    named = (words[1] or "") + words[2]
    (place,) = (place for place in PLACES if np.array_equal(source[cell(place)], sprite[named]))
    target = source.copy()
    target[cell(place)] = sprite[f"{words[3]} {words[2]}"] if words.re.groups == 3 else 255
    return target


def test_targets_are_the_sources_with_the_instruction_applied_and_nothing_else(demo: Path) -> None:
    truth = read_key(demo / "KEY.json")
    assert truth.keys() == pairs(demo).keys()
    for key, pair in pairs(demo).items():
        source, target, instruction = pixels(pair["source.png"]), pixels(pair["png"]), pair["txt"].decode()
        assert source.shape == target.shape == (112, 112, 3)
        assert np.array_equal(edited(source, instruction), target) and not np.array_equal(source, target), key
        assert truth[key].caption == instruction and np.array_equal(render(truth[key]), target), key


def test_shards_have_whole_pairs_of_both_kinds(demo: Path) -> None:
    assert {path.name for path in demo.glob("*.tar")} == {"train-00000.tar", "train-00001.tar", "heldout-00000.tar"}
    assert verify(str(demo / "*.tar")) == []
    found = pairs(demo)
    assert all(pair.keys() == {"png", "source.png", "txt"} for pair in found.values())
    for part, each in (("train", 120), ("heldout", 20)):
        texts = [pair["txt"].decode() for key, pair in found.items() if key.startswith(part)]
        assert [sum(bool(re.fullmatch(kind, text)) for text in texts) for kind in (RECOLOUR, REMOVE)] == [each, each]
    assert len({(pair["source.png"], pair["txt"]) for pair in found.values()}) == len(found), "pairs are distinct"


def test_an_interrupted_set_is_resumed_to_the_same_bytes(demo: Path) -> None:
    before = {path.name: path.read_bytes() for path in demo.glob("*.*")}
    assert not make(demo)
    (demo / "train-00001.tar").unlink()
    assert make(demo)
    assert {path.name: path.read_bytes() for path in demo.glob("*.*")} == before


def combined(looks: list[Look]) -> set[frozenset[str]]:
    """Pairs of things, and things with their colours."""
    found = {frozenset(pair) for pair in combinations([look.thing for look in looks], 2)}
    return found | {frozenset((look.thing, look.colour)) for look in looks if look.colour}


def asked(edit: Edit) -> set[frozenset[str]]:
    """What the instruction combines, by its words: a thing and its new colour, or the removed thing and each other."""
    *_, thing, last = edit.target.caption.split()
    if edit.target.caption.startswith("make"):
        return {frozenset((thing, last))}
    return {frozenset((last, each.look.thing)) for each in edit.target.objects}


def held(combination: frozenset[str]) -> bool:
    """By the rule of scenes."""
    colour = combination & COLOURS.keys()
    return is_held_out(("colour", *colour, *(combination - colour)) if colour else ("pair", *sorted(combination)))


def test_no_training_pair_has_what_held_out_ones_ask_for() -> None:
    trained, words = set(), set()
    for edit in training_edits(3000, 0):
        for scene in edit:
            trained |= combined([each.look for each in scene.objects])
        words |= set(edit.target.caption.split())
    held_out = heldout_edits(100, 1)
    assert len(held_out) == 200 and len(trained) > 1500
    for edit in held_out:
        assert asked(edit) - trained, edit.target.caption
        assert set(edit.target.caption.split()) <= words, "only the combination is new"
        usual = edit.source if edit.target.category == "recolour" else edit.target
        assert not any(map(held, combined([each.look for each in usual.objects]))), "nothing else is"


def test_edits_are_deterministic() -> None:
    assert training_edits(100, 3) == training_edits(100, 3) != training_edits(100, 4)
    assert heldout_edits(10, 3) == heldout_edits(10, 3)
