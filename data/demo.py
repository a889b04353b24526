"""The demo datasets, rendered locally from OpenMoji's drawings: scenes of several, or single drawings with their names.

OpenMoji (https://openmoji.org) is licensed CC BY-SA 4.0, and so are the rendered images.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
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
from .scenes.key import KEY, to_json
from .write import preload, write_shard

PIXELS = 256
SAMPLES_PER_SHARD = {"scenes": 1000, "drawings": 256}
TRAINING_SCENES, HELD_OUT_SCENES = 6000, 100
"""Scenes of the training split, and of each held-out category at most."""
LICENSE = """The images in these shards are made of OpenMoji drawings, rendered to PNG{changes}.

OpenMoji, the open-source emoji and icon project: https://openmoji.org
License: Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0)
https://creativecommons.org/licenses/by-sa/4.0/

If you redistribute these images, credit OpenMoji and keep this license.{captions}
"""
CHANGES = {
    "drawings": (" and otherwise unchanged", " The captions are the emoji's Unicode names."),
    "scenes": (", cropped, some of them tinted, and placed in scenes", ""),
}


class Demo(NamedTuple):
    """Contents of the demo folder."""

    train: int
    heldout: int
    fresh: bool
    """Whether this call wrote anything."""


class Sample(NamedTuple):
    """A pair before its image is rendered from `source`."""

    key: str
    caption: str
    source: Any


class Shard(NamedTuple):
    path: Path
    samples: list[Sample]
    to_png: Callable[[Any], bytes]


def make_demo(out: str | Path, contents: Literal["scenes", "drawings"] = "scenes") -> Demo:
    """Write a demo dataset to `out` as indexed shards `train-*.tar` and `heldout-*.tar`.

    scenes: up to four drawings in an image, with the ground truth in KEY.json. drawings: about 1,900 with their names,
    of which a twentieth is held out. Existing shards are kept, so an interrupted call resumes.
    """
    out, console = Path(out), Console(stderr=True, markup=False, emoji=False)
    parts, to_png = _scene_parts() if contents == "scenes" else _drawing_parts()
    size = SAMPLES_PER_SHARD[contents]
    shards = [
        Shard(out / f"{part}-{number:05d}.tar", samples[start : start + size], to_png)
        for part, samples in parts.items()
        for number, start in enumerate(range(0, len(samples), size))
    ]
    console.print(f"OpenMoji drawings (https://openmoji.org), CC BY-SA 4.0: see {out / 'LICENSE.txt'}", soft_wrap=True)
    changes, captions = CHANGES[contents]
    texts = {"LICENSE.txt": LICENSE.format(changes=changes, captions=captions)}
    if contents == "scenes":
        texts[KEY] = to_json({sample.key: sample.source for samples in parts.values() for sample in samples})
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


def _drawing_parts() -> tuple[dict[str, list[Sample]], Callable[[Path], bytes]]:
    parts: dict[str, list[Sample]] = {"train": [], "heldout": []}
    for name, svg in find_drawings().items():
        is_held_out = int(hashlib.md5(name.encode()).hexdigest(), 16) % 20 == 0
        parts["heldout" if is_held_out else "train"].append(Sample(svg.stem, name, svg))
    return parts, _drawing_png


def _drawing_png(svg: Path) -> bytes:
    return render(svg, PIXELS)


def _scene_parts() -> tuple[dict[str, list[Sample]], Callable[[Any], bytes]]:
    from .scenes.heldout import heldout_scenes, training_scenes

    find_drawings()  # if they are missing, an error before anything is written
    found = {"train": training_scenes(TRAINING_SCENES, seed=0), "heldout": heldout_scenes(HELD_OUT_SCENES, seed=1)}
    parts = {
        part: [Sample(f"{part}{number:05d}", scene.caption, scene) for number, scene in enumerate(scenes)]
        for part, scenes in found.items()
    }
    return parts, _scene_png


def _scene_png(scene: Any) -> bytes:
    from .scenes.grammar import render as render_scene

    file = io.BytesIO()
    Image.fromarray(render_scene(scene)).save(file, "png")
    return file.getvalue()


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
    samples = ((key, {"png": shard.to_png(source), "txt": caption.encode()}) for key, caption, source in shard.samples)
    write_shard(shard.path, samples)
