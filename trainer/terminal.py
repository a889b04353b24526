"""Terminal output of the commands."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def terminal() -> Console:
    """Console on standard output, without markup: [brackets] and :colons: in captions, paths and settings stay."""
    from rich.console import Console

    # A file or pipe has no width to wrap tables to.
    return Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False, highlight=False)
