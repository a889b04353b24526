"""Write boundaries: calls that change the disk, at which this process can kill itself, also halfway through a write."""

from __future__ import annotations

import builtins
import io
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ["fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open"]

Boundary = Callable[[str, str], None]
"""Called with the operation and the path, right before the change."""


def install(boundary: Boundary) -> None:
    """Call `boundary` from now on before every call of this process that changes the disk."""
    for name in CALLS:
        setattr(os, name, _announced(name, getattr(os, name), boundary))
    real_open = builtins.open

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not set(mode) & set("wax"):
            return real_open(file, mode, *args, **options)
        boundary("open", _path(file))
        return _Torn(real_open(file, mode, *args, **options), _path(file), boundary)

    builtins.open = io.open = opened  # type: ignore[assignment]


class _Torn:
    """A file with boundaries before each write, after half of its bytes and after all of them."""

    def __init__(self, file: Any, path: str, boundary: Boundary) -> None:
        self._file, self._path, self._boundary = file, path, boundary

    def write(self, data: Any) -> int:
        self._boundary("write", self._path)
        done = self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._boundary("write, half done,", self._path)
        return done + self._file.write(data[len(data) // 2 :])

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> _Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if not self._file.closed:
            self._boundary("close", self._path)
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def die_at(fatal: int) -> None:
    """Kill this process right before its `fatal`-th boundary, counted from 0."""
    count = -1

    def boundary(operation: str, path: str) -> None:
        nonlocal count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    install(boundary)


def numberless(text: str) -> str:
    """`text` with numbers and random tokens replaced by `#`."""
    return re.sub("[0-9a-f]{12,}|[0-9]+", "#", text)


def label(operation: str, path: str, root: str) -> str | None:
    """Label such as `fsync checkpoints/.step-#.partial/rank-#.safetensors`; None outside `root` and for logs."""
    if not path.startswith(root + "/") or path.startswith(f"{root}/logs/"):
        return None
    return f"{operation} {numberless(path[len(root) + 1 :])}"


def _announced(name: str, real: Callable, boundary: Boundary) -> Callable:
    def call(first: Any, *args: Any, **options: Any) -> Any:
        folder = options.get("dir_fd", options.get("src_dir_fd"))
        boundary(name, _path(first, folder))
        return real(first, *args, **options)

    return call


def _path(file: Any, folder: int | None = None) -> str:
    """The path of a descriptor, or of a name relative to a folder's descriptor."""
    if isinstance(file, int):
        return os.readlink(f"/proc/self/fd/{file}")
    name = os.fspath(file)
    name = name.decode() if isinstance(name, bytes) else name
    base = Path.cwd() if folder is None else Path(os.readlink(f"/proc/self/fd/{folder}"))
    return str(base / name)
