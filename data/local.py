"""Queries of local file systems, including network mounts, that never take a storage error for a missing file.

`os.path`, `glob` and fsspec's listings treat any error as "does not exist". Here each call is retried by itself, so
that consecutive failures do not share one time limit.
"""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from .errors import DataError
from .retry import failure, is_transient, retrying

Found = TypeVar("Found")

NOTHING = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
"""Errors of `os.stat` for a path that does not exist or is invalid."""


def with_retries(action: Callable[[], Found], where: object) -> Found:
    """The result of `action`, with retries of storage errors, then DataLost. Other errors are raised unchanged."""
    try:
        return retrying(action, where)
    except Exception as error:
        if is_transient(error) and not hasattr(error, "transient"):
            raise failure(where, error) from error
        raise


def stat_of(path: str | Path) -> os.stat_result | None:
    """The status of a path, None if it does not exist. Storage errors are retried, then DataLost; other errors, such as
    missing permissions for a folder, are a DataError."""
    try:
        return with_retries(lambda: os.stat(path), path)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        return None  # the path contains a NUL
    except OSError as error:
        if error.errno in NOTHING:
            return None
        raise failure(path, error) from error


def is_kind(path: str | Path, kind: Callable[[int], bool]) -> bool:
    """Whether the path exists and its mode passes `kind`; raises like `stat_of`."""
    found = stat_of(path)
    return found is not None and kind(found.st_mode)


def names_in(folder: str | Path) -> list[str]:
    """Sorted names in a folder. Storage errors are retried, then DataLost; other errors are raised unchanged."""
    return sorted(with_retries(lambda: os.listdir(folder), folder))


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
