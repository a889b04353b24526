"""Where commands print their tables and lines."""

from __future__ import annotations

import sys

from rich.console import Console


def terminal() -> Console:
    """Standard output. Captions, paths and settings are printed as they are: [brackets] and :colons: mean nothing."""
    # A file or a pipe has no width to fold tables to.
    return Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False, highlight=False)


def format_bytes(size: float, digits: int) -> str:
    """`size` bytes with `digits` significant ones, in the largest unit of 1024 that it fills."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.{digits}g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.{digits}g} TiB"
