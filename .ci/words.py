"""Find words that this project does not use, in code, comments, documents, recipes and tests.

    python .ci/words.py              every occurrence and what to write instead; exit code 1 when there is one
    python .ci/words.py FILE …       the same, only in these files
    python .ci/words.py --counts     only the number of occurrences per word

words.yaml, next to this file, lists the words and the places where one is allowed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
LIST = ".ci/words.yaml"
READ = re.compile(r"\.(py|md|ya?ml|toml|cff|jinja|sh|def|txt)$|(^|/)(Makefile|Dockerfile|run)$")
LEFT_OUT = re.compile(
    r"^(\.ci/words\.yaml|tests/ci/test_words\.py|recipes/(foundations|architectures)/|tests/fixtures/)|(^|/)LICENSE"
)
SPACE = r"(?:\s+|\s*\n\s*#:?\s+)"
"""White space between two words; may be a line break, in a comment with the next line's comment mark."""


class Word(NamedTuple):
    """find: as in the list. pattern: the compiled form of `find`."""

    find: str
    pattern: re.Pattern[str]
    instead: str


class Found(NamedTuple):
    path: str
    line: int
    text: str
    word: Word
    content: str
    """The line on which the match begins."""


def read_list(text: str) -> tuple[list[Word], list[dict[str, str]]]:
    """The words, and the allowed places: {path, text, why}."""
    content = yaml.safe_load(text)
    words = []
    for one in content["words"]:
        # A space in a lookbehind is kept as is, since Python requires a fixed width there.
        pattern = "".join(p if p.startswith("(?<") else p.replace(" ", SPACE) for p in _parts(one["find"]))
        words.append(Word(one["find"], re.compile(pattern, re.IGNORECASE), one["instead"]))
    return words, content["allow"]


def _parts(find: str) -> list[str]:
    return re.split(r"(\(\?<[!=][^)]*\))", find)


def search(path: str, text: str, words: Sequence[Word]) -> Iterator[Found]:
    lines = text.splitlines()
    for word in words:
        for match in word.pattern.finditer(text):
            line = text.count("\n", 0, match.start())
            yield Found(path, line + 1, " ".join(match[0].split()), word, lines[line])


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in listed.stdout.split("\0") if path and (ROOT / path).is_file()]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("files", nargs="*", help="default: every tracked file")
    options.add_argument("--counts", action="store_true")
    arguments = options.parse_args()
    words, allowed = read_list((ROOT / LIST).read_text(encoding="utf-8"))
    paths = [path for path in arguments.files or tracked() if READ.search(path) and not LEFT_OUT.search(path)]
    found = [one for path in paths for one in search(path, (ROOT / path).read_text(encoding="utf-8"), words)]
    used = [entry for entry in allowed if any(_allows(entry, one) for one in found)]
    left = [one for one in found if not any(_allows(entry, one) for entry in used)]
    if arguments.counts:
        for word in words:
            places = [one for one in left if one.word is word]
            print(f"{len(places):5}  in {len({one.path for one in places}):3} files  {word.find[:100]}")
        print(f"{len(left):5}  in {len({one.path for one in left}):3} files  in all")
        return 0
    for one in sorted(left):
        print(f"{one.path}:{one.line}: '{one.text}': write {one.word.instead}")
    unused = [] if arguments.files else [entry for entry in allowed if entry not in used]
    for entry in unused:
        print(f"{LIST}: no match at {entry['path']}: {entry['text']!r}; delete the entry")
    return 1 if left or unused else 0


def _allows(entry: dict[str, str], one: Found) -> bool:
    return entry["path"] == one.path and entry["text"] in one.content


if __name__ == "__main__":
    sys.exit(main())
