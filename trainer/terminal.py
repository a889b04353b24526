"""Where commands print their tables and lines."""

from __future__ import annotations

import sys

from rich.console import Console


def terminal() -> Console:
    """Standard output. Captions, paths and settings are printed as they are: [brackets] and :colons: mean nothing."""
    # A file or a pipe has no width to fold tables to.
    return Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False, highlight=False)
