"""Atomic writes of local files. Imports only the standard library."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path


def temporary_name(path: str | os.PathLike) -> str:
    """The temporary name for writing `path`, unique to this process and node."""
    return f"{os.fspath(path)}.tmp-{platform.node()}-{os.getpid()}"


def write_atomic(path: str | os.PathLike, data: bytes | Iterable[bytes], mode: int | None = None) -> None:
    """Write a local file atomically, from bytes or from their parts in order: readers see the old or the complete new
    file, also after a crash. mode: its permissions, by default those from the process's umask."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.writelines((data,) if isinstance(data, bytes) else data)
        commit(temporary, path)
    except OSError as error:
        error.filename = os.fspath(path)  # not the temporary name, and some errors have none
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)  # exists only after an error, such as a full disk


def commit(temporary: str, path: str | os.PathLike) -> None:
    """Sync a complete temporary file, rename it to `path`, and sync the folder."""
    sync(temporary)
    os.replace(temporary, path)
    sync(os.path.dirname(os.path.abspath(path)))


def sync(path: str | os.PathLike) -> None:
    """Flush a file, or a folder's entries (created, renamed and removed names), to disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        error.filename = os.fspath(path)
        raise
    finally:
        os.close(handle)
