"""Local files written whole: a reader, or a crash, finds the old one or the new one. It imports nothing heavy."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def temporary_name(path: str | os.PathLike) -> str:
    """Where this process writes what is to be `path`: no other process on any node does."""
    return f"{os.fspath(path)}.tmp-{platform.node()}-{os.getpid()}"


def write_atomic(path: str | os.PathLike, data: bytes, mode: int | None = None) -> None:
    """Write a local file so that a reader, or a crash, sees the old one or the whole new one. mode: its permissions, by
    default the process's usual ones."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(data)
        commit(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)  # only there still when the disk is full, say


def commit(temporary: str, path: str | os.PathLike) -> None:
    """Bring a finished temporary file to disk and give it its name; then bring the name to disk."""
    for target in (temporary, os.path.dirname(os.path.abspath(path))):
        handle = os.open(target, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if target is temporary:
            os.replace(temporary, path)
