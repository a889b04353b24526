"""Contact sheets and the fonts of their captions."""

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from bifrost.trainer.inference import contact_sheet as sheets
from bifrost.trainer.inference.contact_sheet import font_for, make_contact_sheet
from bifrost.trainer.inference.settings import Sampling

FAST = Sampling(steps=3)
QUICK = ("--flux-steps=2", "--steps=4")


def test_contact_sheet() -> None:
    colours = ["red", "green", "blue"]
    rows = {"made": [Image.new("RGB", (64, 64), c) for c in colours], "real": [Image.new("RGB", (32, 64))] * 3}
    made = make_contact_sheet(
        rows, ["a caption that is much longer than its image is wide and continues", "b", "c"], across=2
    )
    width, height = made.size
    pixels = np.asarray(made).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 128, 0), (0, 0, 255)):
        assert (pixels == colour).all(axis=1).sum() == 128 * 128  # at twice their size
    assert 2 * 128 < width < 2 * 128 + 100 and 4 * 128 < height < 4 * 128 + 200


def test_captions_are_drawn_and_not_boxes() -> None:
    """A missing character is drawn as the font's `.notdef` glyph, like U+FFFF."""
    for text in ("€", "é", "→", "ß", "я", "λ", "ﬁ", "½", "\u2013", "…"):
        font = font_for(text)
        assert bytes(font.getmask(text)) != bytes(font.getmask("\uffff")), text
    assert font_for("a\n\tb").path == font_for("a").path
    assert font_for("猫 and more").getmask("a").getbbox()  # no box for what the usual font has


def test_a_character_that_no_font_has_is_logged_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(sheets, "_boxes", [])
    sheets._font.cache_clear()
    for text in ("\U00016800", "\U00016801 again", "a \U00016800"):  # Bamum, of the plain fonts in none
        font_for(text)
    (line,) = [each.getMessage() for each in caplog.records]
    assert "no font on this machine has \U00016800 (U+16800); install" in line
    font_for("plain text")
    assert len(caplog.records) == 1


def test_fontconfig_finds_fonts_unknown_to_matplotlib(monkeypatch, caplog, tmp_path: Path) -> None:
    """A font installed after matplotlib cached its list."""
    new = Path(shutil.copy(sheets._dejavu(), tmp_path / "new.ttf"))
    program = tmp_path / "fc-match"
    program.write_text(f'#!/bin/sh\n[ "$2" = ":charset=16802 16803" ] && printf %s {new}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    covered = sheets._covered
    monkeypatch.setattr(
        sheets, "_covered", lambda file: frozenset((0x16802, 0x16803)) if file == str(new) else covered(file)
    )
    assert font_for("\U00016803\U00016802").path == str(new) and not caplog.records
    sheets._font.cache_clear()
