"""Files of a dataset, local or behind an fsspec URL: opening, range reads and streams."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Generic, Protocol, TypeVar

from fsspec.implementations.local import LocalFileSystem

from .errors import DataLost, DataMissing
from .remote import RemoteFile, filesystem, read_start
from .retry import call
from .transience import verdict

STREAM_BLOCK = 8 << 20


def is_local(url: str) -> bool:
    """Whether a path or URL is on a local file system."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


class _LocalFile:
    def __init__(self, path: str) -> None:
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 closed by `OpenShards` or `Stream`

    def read(self, start: int, size: int) -> bytes:
        parts, missing = [], size
        while missing and (part := os.pread(self.file.fileno(), missing, start + size - missing)):
            parts.append(part)  # network file systems may return less than is available
            missing -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        self.file.close()


File = _LocalFile | RemoteFile


def open_file(url: str, total: int | None = None) -> File:
    """Open a file for range reads: `read(start, size)` returns less only at the end of the file. total: its size in
    bytes, if known."""
    return _LocalFile(filesystem(url)[1]) if is_local(url) else RemoteFile(url, total)


def exists(url: str) -> bool:
    """Whether the file or object exists; raises DataLost or DataError when this cannot be determined. Its first byte is
    read: to a request for metadata, a login page has the status of a file."""
    try:
        content(url, 1)
    except DataMissing:
        return False
    return True


def content(url: str, limit: int | None = None) -> bytes:
    """Read a small file or object, or its first `limit` bytes. Raises DataMissing, DataLost or DataError."""

    def read() -> bytes:
        if is_local(url):
            with closing(_LocalFile(filesystem(url)[1])) as file:
                return file.read(0, os.fstat(file.file.fileno()).st_size if limit is None else limit)
        return read_start(url) if limit is None else read_start(url, limit)

    return call(read, url)


class Stream:
    """A sequential reader of a file or object, in blocks of `block` bytes; after a storage error it retries from the
    same position."""

    def __init__(self, url: str, block: int | None = None) -> None:
        self.url = url
        self._size = block or STREAM_BLOCK
        self._file: File | None = None
        self._position = 0
        self._block = b""
        self._taken = 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, size: int) -> bytes:
        """Read `size` bytes, fewer only at the end. Raises DataMissing, DataLost or DataError."""
        parts: list[bytes] = []
        while size:
            if self._taken == len(self._block):
                self._block, self._taken = call(self._next, self.url), 0
                self._position += len(self._block)
            parts.append(self._block[self._taken : self._taken + size])
            self._taken += len(parts[-1])
            size -= len(parts[-1])
            if not parts[-1]:
                break
        return b"".join(parts)

    def seek(self, position: int) -> int:
        """Move to an offset in bytes from the start."""
        taken = position - (self._position - len(self._block))
        if 0 <= taken <= len(self._block):
            self._taken = taken
        else:
            self._position, self._block, self._taken = position, b"", 0
        return position

    def _next(self) -> bytes:
        self._file = self._file or open_file(self.url)
        try:
            return self._file.read(self._position, self._size)
        except OSError:
            if isinstance(self._file, _LocalFile):  # the handle of a network file system may never recover
                self._file.close()
                self._file = None
            raise


class _Opened(Protocol):
    @property
    def file(self) -> File: ...


Opened = TypeVar("Opened", bound=_Opened)
Found = TypeVar("Found")


class _Held(Generic[Opened]):
    """An open shard and the number of threads that read from it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held while the shard is being opened."""
        self.opened: Opened | None = None
        self.readers = 0
        self.dropped = False


class OpenShards(Generic[Opened]):
    """LRU cache of at most `max_open` open shards; `opened` opens shard number i.

    Thread-safe: a shard is not closed while another thread reads from it. Range reads have no shared cursor, so a fork
    may keep using files that its parent opened.
    """

    def __init__(self, urls: Sequence[str], opened: Callable[[int], Opened], max_open: int) -> None:
        self.urls = urls
        self.max_open = max_open
        self._opened = opened
        self._renew()

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Held[Opened]] = OrderedDict()
        self._pid = os.getpid()

    def read(self, shard: int, action: Callable[[Opened], Found]) -> Found:
        """The result of `action` on a shard. Retries storage errors, each time with a newly opened file, since the
        handle of a network file system may never recover; then raises DataLost."""
        try:
            return call(lambda: self._once(shard, action), self.urls[shard])
        except DataMissing as error:  # it existed when the dataset was opened: a mount may have disappeared
            raise DataLost(f"{self.urls[shard]}: cannot be read any more; check the storage") from error

    def _once(self, shard: int, action: Callable[[Opened], Found]) -> Found:
        held = self._take(shard)
        try:
            with held.lock:
                if held.opened is None:
                    held.opened = self._opened(shard)
            return action(held.opened)
        except BaseException as error:
            if verdict(error) is not None and not (held.opened and isinstance(held.opened.file, RemoteFile)):
                self._drop(shard, held)  # a remote file has no handle, and keeps track of the object's version
            raise
        finally:
            self._give_back(held)

    def _take(self, shard: int) -> _Held[Opened]:
        if self._pid != os.getpid():  # a fork: the parent's other threads, which may have held the lock, do not exist
            before = self._open
            self._renew()
            for number, held in before.items():
                if held.opened is not None and isinstance(held.opened.file, _LocalFile):
                    self._open[number] = _Held()
                    self._open[number].opened = held.opened
        with self._lock:
            held = self._open.setdefault(shard, _Held())
            held.readers += 1
            self._open.move_to_end(shard)
            while len(self._open) > self.max_open:
                _, oldest = self._open.popitem(last=False)
                self._close(oldest)
            return held

    def _drop(self, shard: int, held: _Held[Opened]) -> None:
        with self._lock:
            if self._open.get(shard) is held:
                del self._open[shard]
                self._close(held)

    def _give_back(self, held: _Held[Opened]) -> None:
        with self._lock:
            held.readers -= 1
            if held.dropped:
                self._close(held)

    def _close(self, held: _Held[Opened]) -> None:
        """Close a shard that is no longer listed, once no thread reads from it."""
        held.dropped = True
        if not held.readers and held.opened is not None:
            held.opened.file.close()

    def __getstate__(self) -> dict:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_open", "_pid")}
        return state  # descriptors and locks cannot be pickled

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._renew()
