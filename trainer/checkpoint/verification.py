"""Files of a checkpoint against their entries in its manifest."""

from __future__ import annotations

from pathlib import Path

from ...data.retry import retrying
from .durable import Entry, hash_file

HEADER = "header"
"""Name of the span before the slots in a rank's file."""


def _same(path: Path, entry: Entry, slot: str | None) -> bool:
    if slot is None or not entry.spans or slot not in entry.spans:
        return hash_file(path) == entry
    spans = (entry.spans[HEADER], entry.spans[slot])
    return all(hash_file(path, span.start, span.size).sha256 == span.sha256 for span in spans)


def file_problem(path: Path, entry: Entry, content: bool, slot: str | None = None) -> str | None:
    """What is wrong with a file, or None; its bytes are read only if the size matches and `content` is set.

    slot: read only the header and this slot of a rank's file, if the manifest has their hashes.
    """
    try:
        size = path.stat().st_size
        if size < entry.size:
            return f"truncated, {size} of {entry.size} bytes"
        if size > entry.size:
            return f"too long, {size} bytes, the manifest has {entry.size}"
        if content and not retrying(lambda: _same(path, entry, slot), path):
            return "damaged, its content does not match the manifest's sha256"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable, {error.strerror}"
    return None
