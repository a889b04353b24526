"""What there is on local file systems, network mounts among them: an error of storage is never taken for a no.

`os.path`, `glob` and fsspec's listings take any error for "nothing there". Here each single question is asked again, so
that several failures one after another do not use up one patience.
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
"""With which `os.stat` says that there is nothing at a path, or that it is none."""


def asked(action: Callable[[], Found], where: object) -> Found:
    """What `action` returns; storage that fails is asked again, then DataLost. Other errors come as they are."""
    try:
        return retrying(action, where)
    except Exception as error:
        if is_transient(error) and not hasattr(error, "passing"):
            raise failure(where, error) from error
        raise


def stat_of(path: str | Path) -> os.stat_result | None:
    """What there is at a path, None where there is nothing. Storage that fails is asked again, then DataLost; other
    errors, such as a folder that must not be entered, are a DataError."""
    try:
        return asked(lambda: os.stat(path), path)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        return None  # a path with a NUL
    except OSError as error:
        if error.errno in NOTHING:
            return None
        raise failure(path, error) from error


def is_kind(path: str | Path, kind: Callable[[int], bool]) -> bool:
    """Whether there is such a file or folder, by a test of its mode; raises like `stat_of`."""
    found = stat_of(path)
    return found is not None and kind(found.st_mode)


def names_in(folder: str | Path) -> list[str]:
    """Sorted names in a folder. Storage that fails is asked again, then DataLost; other errors come as they are."""
    return sorted(asked(lambda: os.listdir(folder), folder))


def matches(pattern: str) -> list[dict[str, Any]]:
    """fsspec's descriptions of what matches a pattern with wildcards, hidden files left out. Folders that must not be
    read hold no match, as in a shell, unless it is the one where the pattern begins; raises like `stat_of`."""
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
    """fsspec's walks go on after any OSError of a folder; DataLost ends them."""

    cachable = False

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> list:
        return asked(lambda: super(_Listing, self).ls(path, detail=detail, **kwargs), path)
