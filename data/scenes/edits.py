"""Editing pairs of scenes: a source, an instruction, and the target, which differs from it in one object's cell.

The held-out rule of scenes applies to both images of a training pair: no training instruction asks for a held-out
colouring, and none removes a thing from next to one with which it is held out as a pair.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .drawings import COLOURED, COLOURS, Look
from .grammar import Object, Scene, draw
from .heldout import HELD_OUT_EDITS, held_out_in

SOURCES = ("colour", "two", "binding", "position", "grid")
"""Categories of the sources: in the others a thing may be there twice, and an instruction would not say which."""


class Edit(NamedTuple):
    """The target's category is the kind of edit, its caption the instruction."""

    source: Scene
    target: Scene


def training_edits(total: int, seed: int) -> list[Edit]:
    """Pairs without a held-out combination, as many of each kind, shuffled."""
    draws = np.random.default_rng(seed)
    each = total // len(HELD_OUT_EDITS)
    found = [edit for kind in HELD_OUT_EDITS for edit in _distinct(kind, (set(), set()), each, draws)]
    return [found[i] for i in draws.permutation(len(found))]


def heldout_edits(each: int, seed: int) -> list[Edit]:
    """Pairs of every kind with the held-out combinations of HELD_OUT_EDITS."""
    draws = np.random.default_rng(seed)
    return [edit for kind, kinds in HELD_OUT_EDITS.items() for edit in _distinct(kind, kinds, each, draws)]


def _distinct(kind: str, kinds: tuple[set[str], set[str]], count: int, draws: np.random.Generator) -> list[Edit]:
    """Distinct pairs whose source and target have held-out combinations of exactly these kinds."""
    found: dict[tuple[tuple[Object, ...], str], Edit] = {}
    while len(found) < count:
        scene = draw(SOURCES[draws.integers(len(SOURCES))], draws)
        edit = _recoloured(scene, draws) if kind == "recolour" else _removed(scene, draws)
        if edit and tuple({combined for combined, *_ in held_out_in(each)} for each in edit) == kinds:
            found[edit.source.objects, edit.target.caption] = edit
    return list(found.values())


def _recoloured(scene: Scene, draws: np.random.Generator) -> Edit | None:
    """One object in another colour; None where no object comes in colours."""
    able = [number for number, each in enumerate(scene.objects) if each.look.thing in COLOURED]
    if not able:
        return None
    number = able[draws.integers(len(able))]
    look, place = scene.objects[number]
    others = [colour for colour in COLOURS if colour != look.colour]
    colour = others[draws.integers(len(others))]
    objects = (*scene.objects[:number], Object(Look(look.thing, colour), place), *scene.objects[number + 1 :])
    return _edit(scene, Scene("recolour", f"make the {look} {colour}", objects))


def _removed(scene: Scene, draws: np.random.Generator) -> Edit | None:
    """Without one object; None where it is the only one."""
    if len(scene.objects) == 1:
        return None
    number = int(draws.integers(len(scene.objects)))
    objects = (*scene.objects[:number], *scene.objects[number + 1 :])
    return _edit(scene, Scene("remove", f"remove the {scene.objects[number].look}", objects))


def _edit(scene: Scene, target: Scene) -> Edit:
    return Edit(scene._replace(phrasing=None), target)  # the source's caption, and its phrasing, are in no sample
