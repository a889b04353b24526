"""Input and output of `bifrost generate`: prompts, and folders of images in the layouts of benchmarks.

The content of a folder is a function of the command only, recorded in its `prompts.jsonl`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.atomic import commit, write_atomic
from ..errors import RunError, writing
from ..io import write_png

if TYPE_CHECKING:
    from PIL import Image

RECORD, SHEET = "prompts.jsonl", "contact_sheet.png"
SHEET_PROMPTS = 64
"""Maximum number of prompts on the contact sheet."""


class Layout(str, Enum):
    plain = "plain"
    geneval = "geneval"
    dpg = "dpg"


@dataclass(frozen=True)
class Prompt:
    """One prompt with the name from its file, and its JSON line."""

    text: str
    name: str | None = None
    line: str | None = None


@dataclass(frozen=True)
class ImageFile:
    """One output file for one prompt: an image, or a 2 x 2 grid of images."""

    file: str
    prompt: Prompt
    seeds: tuple[int, ...]


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from a folder of ID.txt, from JSON lines with `prompt` and optionally `id`, or from a file's lines."""
    if path.is_dir():
        found = [Prompt(clean(_text(file)), file.stem) for file in sorted(path.glob("*.txt"))]
    elif not path.is_file():
        raise RunError(f"{path}: no such prompt file")
    else:
        lines = [line.strip() for line in _text(path).split("\n") if line.strip()]
        jsonl = path.suffix == ".jsonl"
        found = [_json_prompt(f"{path}, line {i + 1}", t) if jsonl else Prompt(clean(t)) for i, t in enumerate(lines)]
    if not found:
        raise RunError(f"{path}: contains no prompts")
    return found


def plan(asked: Sequence[Prompt], listed: Sequence[Prompt], seed: int, layout: Layout) -> list[ImageFile]:
    """All output files of a command, in order; RunError if the layout does not allow these prompts."""
    prompts = [*asked, *listed]
    if not prompts:
        raise RunError("no prompts: give some, or a file of them with --prompts")
    samples = 1 if layout is Layout.plain else 4
    image_files = []
    for number, prompt in enumerate(prompts):
        first = seed + max(0, number - len(asked)) * samples
        seeds = tuple(range(first, first + samples))
        if layout is Layout.plain:
            name = prompt.name or re.sub(r"[^\w]+", "-", prompt.text.lower()).strip("-")[:48] or "empty"
            image_files.append(ImageFile(f"{number:05d}-{name}.png", prompt, seeds))
        elif layout is Layout.geneval:
            if prompt.line is None:
                raise RunError(
                    "--layout geneval needs --prompts with GenEval's evaluation_metadata.jsonl, and only that"
                )
            image_files += [ImageFile(f"{number:05d}/samples/{i:04d}.png", prompt, (s,)) for i, s in enumerate(seeds)]
        else:
            if prompt.name is None:
                raise RunError(
                    "--layout dpg needs only --prompts: a folder of ID.txt, or JSON lines with prompt and id"
                )
            image_files.append(ImageFile(f"images/{prompt.name}.png", prompt, seeds))
    names = {image_file.file for image_file in image_files}
    if len(names) < len(image_files):
        raise RunError("two prompts have the same id: every image needs a unique name")
    return image_files


def record(image_files: Sequence[ImageFile], made_with: dict[str, Any]) -> bytes:
    """`prompts.jsonl`: a line per output file, with everything that determines it."""
    lines = []
    for image_file in image_files:
        seeds = {"seed": image_file.seeds[0]} if len(image_file.seeds) == 1 else {"seeds": image_file.seeds}
        lines.append({"file": image_file.file, "prompt": image_file.prompt.text, **seeds, **made_with})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def read_record(out: Path) -> list[dict[str, Any]]:
    """The lines of the record in `out`, each at least with `file` and `prompt`; empty without a record. RunError unless
    it is one."""
    if not (out / RECORD).is_file():
        return []
    try:
        found = [json.loads(line) for line in _text(out / RECORD).splitlines()]
        if all(isinstance(line["file"], str) and isinstance(line["prompt"], str) for line in found):
            return found
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{out / RECORD}: is not a record of `bifrost generate` ({error!r}); generate again") from error
    raise RunError(f"{out / RECORD}: is not a record of `bifrost generate`; generate again")


def check(out: Path, wanted: bytes) -> None:
    """RunError unless `out` is new, empty, or from the same command."""
    # Listed before the record is checked: another rank may be writing it, and writes images only after it.
    others = [path.name for path in out.iterdir() if RECORD not in path.name] if out.is_dir() else []
    if (out / RECORD).exists():
        if (out / RECORD).read_bytes() != wanted:
            raise RunError(f"{out}: was started with other prompts, settings or weights; give a new folder")
    elif others:
        raise RunError(f"{out}: is not empty ({others[0]}) and was not made by `bifrost generate`; give a new folder")
    elif out.exists() and not out.is_dir():
        raise RunError(f"{out}: is not a folder")


def begin(out: Path, wanted: bytes) -> None:
    """Write the record, unless another command has taken the folder in the meantime."""
    check(out, wanted)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if not (out / RECORD).exists():
            write_atomic(out / RECORD, wanted)


def write(out: Path, image_file: ImageFile, images: Sequence[Image.Image], layout: Layout) -> None:
    """Write one output file atomically.

    GenEval reads NNNNN/samples/*.png and NNNNN/metadata.jsonl, the prompt's own line. DPG-Bench reads a folder that
    contains only ID.png, each a grid of 2 x 2 samples that it splits by the sample's size.
    """
    try:
        _write(out, image_file, images, layout)
    except OSError as error:
        raise RunError(f"{out}: {error}; fix it and run the same command again, it resumes") from error


def _write(out: Path, image_file: ImageFile, images: Sequence[Image.Image], layout: Layout) -> None:
    path = out / image_file.file
    path.parent.mkdir(parents=True, exist_ok=True)
    if layout is Layout.geneval:
        assert image_file.prompt.line is not None
        write_atomic(path.parents[1] / "metadata.jsonl", (image_file.prompt.line + "\n").encode())
    whole = images[0]
    if len(images) == 4:
        from PIL import Image

        width, height = whole.size
        whole = Image.new("RGB", (2 * width, 2 * height))
        for i, image in enumerate(images):
            whole.paste(image, (i % 2 * width, i // 2 * height))
    # Hidden while it is written, so that no benchmark reads a partial file; a leftover is overwritten.
    temporary = out / f".{image_file.file.replace('/', '-')}"
    whole.save(temporary, "PNG")
    commit(str(temporary), path)


def write_contact_sheet(out: Path, image_files: Sequence[ImageFile]) -> None:
    """Write the contact sheet of the first prompts, with the samples of a prompt in a column."""
    from PIL import Image

    from .contact_sheet import make_contact_sheet

    columns: dict[str, list[ImageFile]] = {}
    for image_file in image_files:
        columns.setdefault(image_file.file.split("/samples/")[0], []).append(image_file)
    shown = list(columns.values())[:SHEET_PROMPTS]
    rows = {}
    for row in range(len(shown[0])):
        label = "" if len(shown[0]) == 1 else f"sample {row}"
        rows[label] = [Image.open(out / column[row].file) for column in shown]
    sheet = make_contact_sheet(rows, [column[0].prompt.text for column in shown])
    with writing(out):
        write_png(out / SHEET, sheet)


def clean(text: str) -> str:
    """A prompt cleaned like the captions in training."""
    from ...data.transforms import clean_caption

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
        raise RunError(f"{where}: has no string `prompt`")
    name = found.get("id")
    if name is not None and not re.fullmatch(r"[\w-]+", str(name)):
        raise RunError(f"{where}: id {name!r} cannot be a file name; use letters, digits, _ and -")
    return Prompt(clean(found["prompt"]), None if name is None else str(name), line)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
