"""The demo datasets, rendered locally from OpenMoji's drawings: scenes of several, editing pairs of scenes, or single
drawings with their names.

OpenMoji (https://openmoji.org) is licensed CC BY-SA 4.0, and so are the rendered images.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image
from rich.console import Console

from .atomic import write_atomic
from .errors import DataError
from .index import load_index
from .openmoji import find_drawings, render
from .processes import in_processes, sole_owner
from .progress import track
from .scenes.edits import Edit, heldout_edits, training_edits
from .scenes.grammar import Scene
from .scenes.grammar import render as render_scene
from .scenes.heldout import heldout_scenes, training_scenes
from .scenes.key import KEY, to_json
from .write import preload, write_shard

PIXELS = 256
SAMPLES_PER_SHARD = {"scenes": 1000, "edits": 1000, "drawings": 256}
TRAINING_SCENES, HELD_OUT_SCENES = 6000, 100
"""Scenes of the training split, and of each held-out category at most."""
TRAINING_EDITS, HELD_OUT_EDITS = 3000, 100
"""Editing pairs of the training split, and held-out ones of each kind."""
LICENSE = """The images in these shards are made of OpenMoji drawings, rendered to PNG{changes}.

OpenMoji, the open-source emoji and icon project: https://openmoji.org
License: Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0)
https://creativecommons.org/licenses/by-sa/4.0/

If you redistribute these images, credit OpenMoji and keep this license.{captions}
"""
CHANGES = {
    "drawings": (" and otherwise unchanged", " The captions are the emoji's Unicode names."),
    **dict.fromkeys(("scenes", "edits"), (", cropped, some of them tinted, and placed in scenes", "")),
}


class Demo(NamedTuple):
    """Contents of the demo folder."""

    train: int
    heldout: int
    fresh: bool
    """Whether this call wrote anything."""


class Sample(NamedTuple):
    """A sample before its images are rendered from `contents`."""

    key: str
    caption: str
    contents: Any
    truth: Scene | None = None


class Shard(NamedTuple):
    path: Path
    samples: list[Sample]
    images: Callable[[Any], dict[str, bytes]]


Parts = tuple[dict[str, list[Sample]], Callable[[Any], dict[str, bytes]]]
"""Samples by part, and what renders the images of one from its contents, by extension."""


def make_demo(out: str | Path, contents: Literal["scenes", "edits", "drawings"] = "scenes") -> Demo:
    """Write a demo dataset to `out` as indexed shards `train-*.tar` and `heldout-*.tar`.

    scenes: up to four drawings in an image, with the ground truth in KEY.json. edits: pairs of scenes with the
    instruction that turns KEY.source.png into KEY.png, and the ground truth of the latter. drawings: about 1,900 with
    their names, of which a twentieth is held out. Existing shards are kept, so an interrupted call resumes.
    """
    out, console = Path(out), Console(stderr=True, markup=False, emoji=False)
    parts, images = {"scenes": _scene_parts, "edits": _edit_parts, "drawings": _drawing_parts}[contents]()
    size = SAMPLES_PER_SHARD[contents]
    shards = [
        Shard(out / f"{part}-{number:05d}.tar", samples[start : start + size], images)
        for part, samples in parts.items()
        for number, start in enumerate(range(0, len(samples), size))
    ]
    console.print(f"OpenMoji drawings (https://openmoji.org), CC BY-SA 4.0: see {out / 'LICENSE.txt'}", soft_wrap=True)
    changes, captions = CHANGES[contents]
    texts = {"LICENSE.txt": LICENSE.format(changes=changes, captions=captions)}
    if truth := {each.key: each.truth for samples in parts.values() for each in samples if each.truth}:
        texts[KEY] = to_json(truth)
    with sole_owner(out):
        _claim(out, texts)
        missing = [shard for shard in shards if not _written(shard)]
        if missing:
            preload()
            work = in_processes(_write, missing, None)
            for _ in track(work, "rendering", len(missing), "shards"):
                pass
    train, heldout = len(parts["train"]), len(parts["heldout"])
    state = "written" if missing else "already complete"
    console.print(f"{out}: {train} training and {heldout} held-out pairs, {state}", soft_wrap=True)
    return Demo(train, heldout, bool(missing))


def _drawing_parts() -> Parts:
    parts: dict[str, list[Sample]] = {"train": [], "heldout": []}
    for name, svg in find_drawings().items():
        is_held_out = int(hashlib.md5(name.encode()).hexdigest(), 16) % 20 == 0
        parts["heldout" if is_held_out else "train"].append(Sample(svg.stem, name, svg))
    return parts, _drawing_images


def _drawing_images(svg: Path) -> dict[str, bytes]:
    return {"png": render(svg, PIXELS)}


def _scene_parts() -> Parts:
    find_drawings()  # if they are missing, an error before anything is written
    found = {"train": training_scenes(TRAINING_SCENES, seed=0), "heldout": heldout_scenes(HELD_OUT_SCENES, seed=1)}
    return _samples(found, lambda scene: scene), _scene_images


def _edit_parts() -> Parts:
    find_drawings()  # as above
    found = {"train": training_edits(TRAINING_EDITS, seed=0), "heldout": heldout_edits(HELD_OUT_EDITS, seed=1)}
    return _samples(found, lambda edit: edit.target), _edit_images


def _samples(found: Mapping[str, Sequence[Any]], truth: Callable[[Any], Scene]) -> dict[str, list[Sample]]:
    """By part. found: contents of the samples by part; truth: the scene that they are of."""
    return {
        part: [Sample(f"{part}{n:05d}", truth(each).caption, each, truth(each)) for n, each in enumerate(contents)]
        for part, contents in found.items()
    }


def _scene_images(scene: Scene) -> dict[str, bytes]:
    file = io.BytesIO()
    Image.fromarray(render_scene(scene)).save(file, "png")
    return {"png": file.getvalue()}


def _edit_images(edit: Edit) -> dict[str, bytes]:
    return {"png": _scene_images(edit.target)["png"], "source.png": _scene_images(edit.source)["png"]}


def _claim(out: Path, texts: Mapping[str, str]) -> None:
    """Write these files before any shard. Raises DataError if `out` holds shards, or other versions of these files,
    that a call with the same contents has not written."""
    found = {name: (out / name).read_text(encoding="utf-8") if (out / name).exists() else None for name in texts}
    if found == texts:
        return
    foreign = [name for name, text in found.items() if text not in (None, texts[name])]
    foreign += sorted(path.name for path in out.glob("*.tar"))
    if foreign:
        raise DataError(f"{out}: {foreign[0]} belongs to another dataset; name an empty folder")
    for name, text in texts.items():
        write_atomic(out / name, text.encode())


def _written(shard: Shard) -> bool:
    """Whether the shard exists and has exactly these samples."""
    try:
        index = load_index(str(shard.path))
        keys = [index.entry(sample)[0] for sample in range(index.header.samples)]
        return shard.path.stat().st_size == index.header.bytes and keys == [sample.key for sample in shard.samples]
    except (OSError, ValueError):
        return False


def _write(shard: Shard) -> None:
    samples = ((each.key, {**shard.images(each.contents), "txt": each.caption.encode()}) for each in shard.samples)
    write_shard(shard.path, samples)
