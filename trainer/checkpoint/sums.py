"""`SHA256SUMS` of an exported folder: detects files that were damaged or replaced on their way.

The format is that of coreutils, so that `sha256sum --check SHA256SUMS` verifies the folder too. It does not protect
from whoever may rewrite the list.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...data.retry import call
from ..errors import RunError
from .durable import sha256

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write_sums(folder: Path, left_out: Iterable[str] = ()) -> None:
    """Write the list of all files below `folder`, without those named in `left_out`, which may be edited later."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = [name for file in files if (name := file.relative_to(folder).as_posix()) not in {SUMS, *left_out}]
    lines = [f"{digest}  {name}\n" for name, digest in zip(names, _digests(folder, names), strict=True)]
    (folder / SUMS).write_text("".join(lines))


def verify_sums(folder: Path, part: str | None = None) -> None:
    """RunError unless the files below the sub-folder `part` are those of the list in `folder`, each with its hash;
    without `part`, unless all that are listed have theirs.

    Every byte is read. Files whose name begins with a dot do not count.
    """
    if not (folder / SUMS).is_file():
        raise RunError(f"{folder}: has no {SUMS}; write the folder with `bifrost export --format pipeline`")
    text = call(lambda: (folder / SUMS).read_text(encoding="utf-8"), folder / SUMS)
    listed = {found[2]: found[1] for line in text.splitlines() if (found := _LINE.fullmatch(line))}
    wanted = {name: digest for name, digest in listed.items() if part is None or name.startswith(f"{part}/")}
    there = {
        file.relative_to(folder).as_posix()
        for file in (folder / (part or "")).rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }
    if missing := sorted(wanted.keys() - there):
        raise RunError(f"{folder / missing[0]}: missing, {SUMS} lists it; fetch the folder again")
    if part is not None and (unknown := sorted(there - wanted.keys())):
        raise RunError(f"{folder / unknown[0]}: not in {SUMS}; remove it, or fetch the folder again")
    for (name, digest), found in zip(wanted.items(), _digests(folder, wanted), strict=True):
        if found != digest:
            raise RunError(f"{folder / name}: its SHA-256 is not that in {SUMS}; fetch it again")


def _digests(folder: Path, names: Iterable[str]) -> list[str]:
    """The SHA-256 of files, several at a time: hashing releases Python's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda name: call(lambda: sha256(folder / name), folder / name), names))
