"""Expansion of local patterns with wildcards, that never takes a storage error for a missing file."""

from __future__ import annotations

import os
import posixpath
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from .local import NOTHING, names_in, with_retries
from .retry import failure


def matches(pattern: str) -> list[dict[str, Any]]:
    """fsspec's entries that match a pattern with wildcards, without hidden files. Unreadable folders have no matches,
    as in a shell, except the folder at which the pattern starts; raises like `stat_of`."""
    found: Any = _Listing().glob(pattern, detail=True)  # a dict, with detail
    shown = [item for path, item in sorted(found.items()) if not posixpath.basename(path).startswith(".")]
    if not shown:
        begin = min(pattern.index(mark) for mark in "*?[" if mark in pattern)
        folder = os.path.dirname(pattern[:begin]) or "."
        try:
            names_in(folder)
        except OSError as error:
            if error.errno not in NOTHING:
                raise failure(folder, error) from error
    return shown


class _Listing(LocalFileSystem):
    """fsspec's walk skips a folder on any OSError, but not on DataLost."""

    cachable = False

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> list:
        return with_retries(lambda: super(_Listing, self).ls(path, detail=detail, **kwargs), path)
