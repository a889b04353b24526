"""Scenes of few things, which a short run learns, as a folder like the demo's."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from bifrost.data.scenes.grammar import Scene, render
from bifrost.data.scenes.heldout import heldout_scenes, training_scenes
from bifrost.data.scenes.key import KEY, to_json
from bifrost.data.write import write_shard

THINGS = {"apple", "bear", "bell", "cat", "crab", "dog", "drum", "fox", "frog", "owl"}
MIX = {"single": 0.1, "two": 0.9}


def write(folder: Path) -> None:
    """Scenes of THINGS; the held-out ones have pairs that the rule holds out."""
    folder.mkdir()
    parts = {"train": training_scenes(30000, 0, MIX), "heldout": heldout_scenes(2000, 1)}
    truth: dict[str, Scene] = {}
    for part, scenes in parts.items():
        few = [s for s in scenes if s.category in MIX and {each.look.thing for each in s.objects} <= THINGS]
        named = {f"{part}{number:05d}": scene for number, scene in enumerate(few)}
        write_shard(folder / f"{part}-00000.tar", ((key, sample(scene)) for key, scene in named.items()))
        truth |= named
    (folder / KEY).write_text(to_json(truth))


def sample(scene: Scene) -> dict[str, bytes]:
    file = io.BytesIO()
    Image.fromarray(render(scene)).save(file, "png")
    return {"png": file.getvalue(), "txt": scene.caption.encode()}
