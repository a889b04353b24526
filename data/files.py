"""Files of a data set, local or behind an fsspec URL: addresses, opening, reading by position, writing whole."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from .errors import DataError, DataLost

log = logging.getLogger(__name__)

PAUSES_S = (0.5, 2.0, 8.0)
"""Before asking storage again for what it failed to give."""


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it, of a path or URL; DataError when none can be used here."""
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}; check the address, or install the package that serves it") from None


def is_local(url: str) -> bool:
    """Whether a path or URL lies on this machine's file systems."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


class _LocalFile:
    def __init__(self, path: str) -> None:
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 closed by `OpenShards`

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self.file.fileno(), size, start)

    def close(self) -> None:
        self.file.close()


class _RemoteFile:
    def __init__(self, url: str) -> None:
        self.url = url

    def read(self, start: int, size: int) -> bytes:
        fs, path = filesystem(self.url)  # cached by fsspec, a fresh one after a fork
        return fs.cat_file(path, start=start, end=start + size)

    def close(self) -> None:
        pass


File = _LocalFile | _RemoteFile


def open_file(url: str) -> File:
    """A file to read by position."""
    return _LocalFile(filesystem(url)[1]) if is_local(url) else _RemoteFile(url)


class _Opened(Protocol):
    @property
    def file(self) -> File: ...


Opened = TypeVar("Opened", bound=_Opened)
Found = TypeVar("Found")


class OpenShards(Generic[Opened]):
    """The shards that were read last, at most `max_open` of them kept open; `opened` opens shard number i.

    Local files are read by position and remote ones by range, both without a shared cursor, so a fork may go on using
    what its parent opened.
    """

    def __init__(self, urls: Sequence[str], opened: Callable[[int], Opened], max_open: int) -> None:
        self.urls = urls
        self.max_open = max_open
        self._opened = opened
        self._open: OrderedDict[int, Opened] = OrderedDict()

    def read(self, shard: int, action: Callable[[Opened], Found]) -> Found:
        """What `action` finds in a shard. Storage that fails is asked again over some ten seconds, each time by a file
        opened anew, since the handle of a network file system may never recover; then DataLost."""
        for pause in (*PAUSES_S, None):
            try:
                return action(self._get(shard))
            except OSError as error:
                if shard in self._open:
                    self._open.pop(shard).file.close()
                if pause is None:
                    raise DataLost(
                        f"{self.urls[shard]}: cannot be read any more ({error}); check the storage"
                    ) from None
                log.warning("%s: %s; reading again in %g s", self.urls[shard], error, pause)
                time.sleep(pause)
        raise AssertionError

    def _get(self, shard: int) -> Opened:
        if shard not in self._open:
            self._open[shard] = self._opened(shard)
            if len(self._open) > self.max_open:
                self._open.popitem(last=False)[1].file.close()
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}  # descriptors do not travel


def temporary_name(path: str | os.PathLike) -> str:
    """Where this process writes what is to be `path`: no other process on any node does."""
    return f"{os.fspath(path)}.tmp-{platform.node()}-{os.getpid()}"


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Write a local file so that a reader, or a crash, sees the old one or the whole new one."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
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
