"""Queries of local file systems, including network mounts, that never take a storage error for a missing file.

`os.path`, `glob` and fsspec's listings treat any error as "does not exist". Here each call is retried by itself, so
that consecutive failures do not share one time limit.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

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
