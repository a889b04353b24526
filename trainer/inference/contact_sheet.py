"""Contact sheets: rows of images side by side, with a caption above every column and a label left of every row."""

from __future__ import annotations

import functools
import logging
import shutil
import subprocess
import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.ImageFont import FreeTypeFont

log = logging.getLogger(__name__)

GAP, TEXT = 6, 13
LINES = 3
SMALLEST, LARGEST = 96, 256
"""Minimum and maximum side in pixels of displayed images: scaled up by whole numbers, scaled down smoothly."""


def make_contact_sheet(
    rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str], across: int = 8, lines: int = LINES
) -> Image.Image:
    """One image of `rows`, label -> an image per column.

    Columns beyond `across` are placed in a block below. lines: of a caption at most; a longer one ends in an ellipsis.
    """
    assert rows and columns and all(len(images) == len(columns) for images in rows.values())
    side = _side(max(max(image.size) for images in rows.values() for image in images))
    margin = max(int(font_for(label).getlength(label)) for label in rows)
    margin += 2 * GAP if margin else GAP
    heading = lines * (TEXT + 3) + GAP if any(columns) else GAP
    across = min(across, len(columns))
    blocks = -(-len(columns) // across)
    block = heading + len(rows) * (side + GAP)
    canvas = Image.new("RGB", (margin + across * (side + GAP), blocks * block + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for number, caption in enumerate(columns):
        left, top = margin + number % across * (side + GAP), number // across * block + GAP
        font = font_for(caption)
        wrapped = _wrapped(caption, side, font, lines)
        pen.multiline_text((left, top), "\n".join(wrapped), fill="black", font=font, spacing=2)
        for place, (label, images) in enumerate(rows.items()):
            y = number // across * block + heading + place * (side + GAP)
            canvas.paste(_fit(images[number], side), (left, y))
            if left == margin:
                pen.text((GAP, y + side // 2), label, fill="black", font=font_for(label), anchor="lm")
    return canvas


def font_for(text: str) -> FreeTypeFont:
    """DejaVu Sans, bundled with matplotlib; if it lacks a character of `text`, an installed font that has all of its
    characters, if there is one."""
    return _font(frozenset(ord(one) for one in text if one.isprintable()) - _covered(_dejavu()))


@functools.lru_cache(maxsize=256)
def _font(missing: frozenset[int]) -> FreeTypeFont:
    file = _dejavu()
    if missing:
        from matplotlib.font_manager import fontManager

        # "Last Resort", also bundled with matplotlib, has a box for every character.
        others = sorted({entry.fname for entry in fontManager.ttflist if "Last Resort" not in entry.name})
        found = next((other for other in others if missing <= _covered(other)), None) or _fontconfig_match(missing)
        if found is None:
            _warn_of_boxes(chr(min(missing)))
        file = found or file
    return ImageFont.truetype(file, TEXT)


def _fontconfig_match(missing: frozenset[int]) -> str | None:
    """fontconfig's font for these characters; matplotlib's font list lacks those installed after it was cached."""
    if (program := shutil.which("fc-match")) is None:
        return None
    pattern = ":charset=" + " ".join(f"{point:x}" for point in sorted(missing))
    try:
        done = subprocess.run([program, "--format=%{file}", pattern], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if missing <= _covered(done.stdout) else None


_boxes: list[str] = []
"""The first character missing from all fonts; logged once."""


def _warn_of_boxes(character: str) -> None:
    if not _boxes:
        _boxes.append(character)
        log.warning(
            "contact sheets show boxes: no font on this machine has %s (U+%04X); install one, such as the package"
            " fonts-noto-cjk for Chinese, Japanese and Korean, or fonts-noto-core for other scripts",
            character,
            ord(character),
        )


def _dejavu() -> str:
    import matplotlib

    return f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"


@functools.lru_cache(maxsize=512)
def _covered(file: str) -> frozenset[int]:
    """Code points for which a font has a glyph."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):  # removed since matplotlib listed it, or of a type that FreeType cannot open
        return frozenset()


def _wrapped(caption: str, width: int, font: FreeTypeFont, most: int) -> list[str]:
    """The caption in up to `most` lines of about `width` pixels at most."""
    average = font.getlength(caption) / len(caption) if caption else 1.0
    characters = max(6, int(width / max(average, font.getlength("n"))))
    return textwrap.wrap(caption, characters, max_lines=most, placeholder="…")


def _side(largest: int) -> int:
    return min(LARGEST, largest * max(1, -(-SMALLEST // largest)))


def _fit(image: Image.Image, side: int) -> Image.Image:
    """The image fitted into a square of `side`, aspect ratio preserved; small ones stay sharp."""
    kind = Image.Resampling.NEAREST if side >= max(image.size) else Image.Resampling.LANCZOS
    return ImageOps.pad(image.convert("RGB"), (side, side), kind, "white")
