"""What `bifrost generate` reads and writes: prompts, and folders of pictures as people and benches read them.

A folder's work is a function of the command alone, and `prompts.jsonl` in it is the record of that.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from PIL import Image

from ...data.atomic import commit, write_atomic
from ...data.transforms import clean_caption
from ..errors import RunError, writing
from .contact_sheet import sheet

RECORD, SHEET = "prompts.jsonl", "contact_sheet.png"
ON_SHEET = 64
"""Prompts that the contact sheet shows at most."""


class Layout(str, Enum):
    plain = "plain"
    geneval = "geneval"
    dpg = "dpg"


@dataclass(frozen=True)
class Prompt:
    """One prompt with the name that its file gives it, and the JSON line that it stood in."""

    text: str
    name: str | None = None
    line: str | None = None


@dataclass(frozen=True)
class Picture:
    """One image file, or a 2 x 2 grid in one, of one prompt."""

    file: str
    prompt: Prompt
    seeds: tuple[int, ...]


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a folder of ID.txt, of JSON lines with `prompt` and perhaps `id`, or of a file with one a line."""
    if path.is_dir():
        found = [Prompt(clean(_text(file)), file.stem) for file in sorted(path.glob("*.txt"))]
    elif not path.is_file():
        raise RunError(f"{path}: no such file of prompts")
    else:
        lines = [line.strip() for line in _text(path).split("\n") if line.strip()]
        jsonl = path.suffix == ".jsonl"
        found = [_json_prompt(f"{path}, line {i + 1}", t) if jsonl else Prompt(clean(t)) for i, t in enumerate(lines)]
    if not found:
        raise RunError(f"{path}: holds no prompts")
    return found


def plan(asked: Sequence[Prompt], listed: Sequence[Prompt], seed: int, layout: Layout) -> list[Picture]:
    """All pictures of a command, in order; RunError when the layout cannot be made of these prompts."""
    prompts = [*asked, *listed]
    if not prompts:
        raise RunError("no prompts: give some, or a file of them with --prompts")
    samples = 1 if layout is Layout.plain else 4
    pictures = []
    for number, prompt in enumerate(prompts):
        first = seed + max(0, number - len(asked)) * samples
        seeds = tuple(range(first, first + samples))
        if layout is Layout.plain:
            name = prompt.name or re.sub(r"[^\w]+", "-", prompt.text.lower()).strip("-")[:48] or "empty"
            pictures.append(Picture(f"{number:05d}-{name}.png", prompt, seeds))
        elif layout is Layout.geneval:
            if prompt.line is None:
                raise RunError("--layout geneval needs --prompts with the bench's evaluation_metadata.jsonl, alone")
            pictures += [Picture(f"{number:05d}/samples/{i:04d}.png", prompt, (s,)) for i, s in enumerate(seeds)]
        else:
            if prompt.name is None:
                raise RunError(
                    "--layout dpg needs --prompts alone: a folder of ID.txt, or JSON lines with prompt and id"
                )
            pictures.append(Picture(f"images/{prompt.name}.png", prompt, seeds))
    twice = {picture.file for picture in pictures}
    if len(twice) < len(pictures):
        raise RunError("two prompts have the same id: every picture needs a name of its own")
    return pictures


def record(pictures: Sequence[Picture], made_with: dict[str, Any]) -> bytes:
    """`prompts.jsonl`: a line a picture, with all that it was made from."""
    lines = []
    for picture in pictures:
        seeds = {"seed": picture.seeds[0]} if len(picture.seeds) == 1 else {"seeds": picture.seeds}
        lines.append({"file": picture.file, "prompt": picture.prompt.text, **seeds, **made_with})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def check(out: Path, wanted: bytes) -> None:
    """RunError unless `out` is new, empty, or of this very command."""
    # Listed before the record is looked for: another rank may be writing it, and writes pictures only after it.
    others = [path.name for path in out.iterdir() if RECORD not in path.name] if out.is_dir() else []
    if (out / RECORD).exists():
        if (out / RECORD).read_bytes() != wanted:
            raise RunError(f"{out}: was begun with other prompts, settings or weights; name a new folder")
    elif others:
        raise RunError(f"{out}: is not empty ({others[0]}) and was not made by `bifrost generate`; name a new folder")
    elif out.exists() and not out.is_dir():
        raise RunError(f"{out}: is not a folder")


def begin(out: Path, wanted: bytes) -> None:
    """Write the record, unless another command took the folder in the meantime."""
    check(out, wanted)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if not (out / RECORD).exists():
            write_atomic(out / RECORD, wanted)


def write(out: Path, picture: Picture, images: Sequence[Image.Image], layout: Layout) -> None:
    """One picture, whole or not at all.

    GenEval reads NNNNN/samples/*.png beside NNNNN/metadata.jsonl, the prompt's own line. DPG-Bench reads a folder of
    ID.png alone, each 2 x 2 samples that it cuts at the sample's size.
    """
    try:
        _write(out, picture, images, layout)
    except OSError as error:
        raise RunError(f"{out}: {error}; put it right and run the same command again, it goes on") from error


def _write(out: Path, picture: Picture, images: Sequence[Image.Image], layout: Layout) -> None:
    path = out / picture.file
    path.parent.mkdir(parents=True, exist_ok=True)
    if layout is Layout.geneval:
        assert picture.prompt.line is not None
        write_atomic(path.parents[1] / "metadata.jsonl", (picture.prompt.line + "\n").encode())
    whole = images[0]
    if len(images) == 4:
        width, height = whole.size
        whole = Image.new("RGB", (2 * width, 2 * height))
        for i, image in enumerate(images):
            whole.paste(image, (i % 2 * width, i // 2 * height))
    # Not beside the others while it is written, where a bench would read it; a killed one is written over.
    temporary = out / f".{picture.file.replace('/', '-')}"
    temporary.write_bytes(_png(whole))
    commit(str(temporary), path)


def draw_sheet(out: Path, pictures: Sequence[Picture]) -> None:
    """The contact sheet of the first prompts; samples of a prompt stand below one another."""
    columns: dict[str, list[Picture]] = {}
    for picture in pictures:
        columns.setdefault(picture.file.split("/samples/")[0], []).append(picture)
    shown = list(columns.values())[:ON_SHEET]
    rows = {}
    for row in range(len(shown[0])):
        label = "" if len(shown[0]) == 1 else f"sample {row}"
        rows[label] = [Image.open(out / column[row].file) for column in shown]
    picture = _png(sheet(rows, [column[0].prompt.text for column in shown]))
    with writing(out):
        write_atomic(out / SHEET, picture)


def clean(text: str) -> str:
    """A prompt as training has captions."""
    try:
        return clean_caption(text) if text.strip() else ""
    except ValueError as error:
        raise RunError(f"prompt {text!r}: {error}") from error


def _json_prompt(where: str, line: str) -> Prompt:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise RunError(f"{where}: is not JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise RunError(f"{where}: has no text under prompt")
    name = found.get("id")
    if name is not None and not re.fullmatch(r"[\w-]+", str(name)):
        raise RunError(f"{where}: id {name!r} cannot be a file's name; use letters, digits, _ and -")
    return Prompt(clean(found["prompt"]), None if name is None else str(name), line)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: is not UTF-8 text; save it as that") from error


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
