"""The word check finds listed words, also across line breaks, and accepts good English."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "words.py"
MADE = runpy.run_path(str(SCRIPT))


def found(text: str) -> list[str]:
    words, _ = MADE["read_list"]((ROOT / MADE["LIST"]).read_text())
    return [one.text for one in MADE["search"]("x.py", text, words)]


@pytest.mark.parametrize(
    "line",
    [
        "64 samples a step",
        "12 ms a step",
        "one JSON object a line",
        "once a sample",
        "Seconds an epoch",
        "the rank is told",
        "next steps go on",
        "beside the shards",
        "the rival's time",
        "it comes to 3 GB",
        "what the header says",
        "a folder is no run",
    ],
)
def test_listed_phrase_is_found(line: str) -> None:
    assert len(found(line)) == 1
    assert len(found(line.replace(" ", "\n    # "))) == 1, "across the lines of a comment"


@pytest.mark.parametrize(
    "text",
    [
        "64 samples per step, once per epoch, 2 GB per rank",
        "There is no rank left, and no longer a step to take",
        "besides, the process outlives its parent; lifetimes, ongoing work",
        "x = 5  # a start",
        "BatchNorm comes with statistics; a step of two samples",
    ],
)
def test_good_english_is_accepted(text: str) -> None:
    assert found(text) == []


def test_place_and_suggestion_are_printed(tmp_path: Path) -> None:
    bad, good = tmp_path / "bad.md", tmp_path / "good.py"
    bad.write_text("# Title\n\nSpeed in samples a second.\n")
    good.write_text("speed = 3  # samples per second\n")
    ended = subprocess.run([sys.executable, SCRIPT, bad, good], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stdout.startswith(f"{bad}:3: 'samples a second': write per ")
    assert ended.stdout.count("\n") == 1
    assert subprocess.run([sys.executable, SCRIPT, good], capture_output=True).returncode == 0


def test_allowed_place_applies_only_to_its_file_and_text() -> None:
    words, _ = MADE["read_list"]((ROOT / MADE["LIST"]).read_text())
    (one,) = MADE["search"]("docs/a.md", "the tree lies in a plane", words)
    allows = MADE["_allows"]
    assert allows({"path": "docs/a.md", "text": "in a plane"}, one)
    assert not allows({"path": "docs/b.md", "text": "in a plane"}, one)
    assert not allows({"path": "docs/a.md", "text": "in space"}, one)
