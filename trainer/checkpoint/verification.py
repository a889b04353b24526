"""Files of a checkpoint against their entries in its manifest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from ...data.retry import retrying
from .durable import Entry, Span, is_intact

HEADER = "header"
"""Name of the span before the slots in a rank's file."""


DAMAGED = "damaged, its content does not match the hash in the manifest"


def _spans(entry: Entry, names: Collection[str] | None) -> Iterable[Span]:
    if names is None or not entry.spans.keys() >= set(names):
        return entry.spans.values()
    return [entry.spans[name] for name in names]


def file_problem(path: Path, entry: Entry, content: bool, names: Collection[str] | None = None) -> str | None:
    """What is wrong with a file, or None; its bytes are read only if the size matches and `content` is set.

    names: read only the spans of these names, if the file has them all.
    """
    try:
        size = path.stat().st_size
        if size < entry.size:
            return f"truncated, {size} of {entry.size} bytes"
        if size > entry.size:
            return f"too long, {size} bytes, the manifest has {entry.size}"
        if content and not retrying(lambda: is_intact(path, _spans(entry, names)), path):
            return DAMAGED
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable, {error.strerror}"
    return None
