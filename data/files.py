"""Files of a dataset, local or behind an fsspec URL: opening, range reads and streams."""

from __future__ import annotations

import os
import posixpath
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Generic, Protocol, TypeVar

from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from .atomic import write_atomic
from .errors import DataError, DataLost, DataMissing
from .local import names_in, stat_of
from .remote import LONGEST, Fetch, Response, fetch, filesystem, protocol, read_start, size_of
from .remote_file import RemoteFile
from .retry import call
from .transience import verdict

STREAM_BLOCK = 8 << 20


def is_local(url: str) -> bool:
    """Whether a path or URL is on a local file system."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


class _LocalFile:
    def __init__(self, path: str) -> None:
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 closed by `close`

    def __del__(self) -> None:
        if hasattr(self, "file"):  # opening may have failed
            self.close()

    def read(self, start: int, size: int) -> bytes:
        parts, missing = [], size
        while missing and (part := os.pread(self.file.fileno(), missing, start + size - missing)):
            parts.append(part)  # network file systems may return less than is available
            missing -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        self.file.close()


File = _LocalFile | RemoteFile


def open_file(url: str, total: int | None = None, get: Fetch = fetch) -> File:
    """Open a file for range reads: `read(start, size)` returns less only at the end of the file. total: its size in
    bytes, if known. get: makes the requests for a remote file."""
    return _LocalFile(filesystem(url)[1]) if is_local(url) else RemoteFile(url, total, get)


def exists(url: str) -> bool:
    """Whether the file or object exists; raises DataLost or DataError when this cannot be determined. Its first byte is
    read: to a request for metadata, a login page has the status of a file."""
    try:
        content(url, 1)
    except DataMissing:
        return False
    return True


def content(url: str, limit: int | None = None, get: Fetch = fetch) -> bytes:
    """Read a small file or object, or its first `limit` bytes. get: makes the request for a remote one. Raises
    DataMissing, DataLost or DataError."""

    def read() -> bytes:
        if is_local(url):
            with closing(_LocalFile(filesystem(url)[1])) as file:
                return file.read(0, os.fstat(file.file.fileno()).st_size if limit is None else limit)
        return read_start(url, LONGEST if limit is None else limit, get)

    return call(read, url)


def file_size(url: str) -> int | None:
    """Size of a file or object in bytes, None if it does not exist. Raises DataLost or DataError."""
    if is_local(url):
        found = stat_of(filesystem(url)[1])
        return found and found.st_size
    try:
        return call(lambda: size_of(url), url)
    except DataMissing:
        return None


def names_at(folder: str) -> list[str]:
    """Sorted names in a folder, or directly below a prefix in an object store; none if it does not exist. Raises
    DataLost or DataError."""
    if is_local(folder):
        return names_in(filesystem(folder)[1])
    fs, path = filesystem(folder)
    try:
        return sorted(posixpath.basename(name.rstrip("/")) for name in call(lambda: fs.ls(path, detail=False), folder))
    except DataMissing:
        return []


def require_writable(url: str, what: str) -> None:
    """DataError when `what` cannot be written at `url`: over HTTP, or in a local folder without permission."""
    fs, path = filesystem(url)
    remedy = "name another place with --index-dir"
    if protocol(fs) == "http":
        raise DataError(f"{url}: {what} cannot be written over HTTP; {remedy}, or make it where the shards are stored")
    if not is_local(url):
        return
    folder = os.path.dirname(path)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.access(folder, os.W_OK):
        raise DataError(
            f"{folder}: not writable, and {what} is stored in it; change the folder's permissions, {remedy}, or make"
            " your own shards from these with `bifrost data ingest`"
        )


def write(url: str, data: bytes) -> None:
    """Write a small file or object atomically; its folder is made if it is missing. Raises DataError or DataLost."""
    fs, path = filesystem(url)

    def put() -> None:
        if not isinstance(fs, AsyncFileSystem):  # object stores have no folders; s3fs would create the bucket
            fs.makedirs(posixpath.dirname(path), exist_ok=True)
        if is_local(url):
            write_atomic(path, data)
        else:
            fs.pipe_file(path, data)

    call(put, url)


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


class OpenShards(Generic[Opened]):
    """LRU cache of at most `max_open` open shards; `opened` opens shard number i.

    Thread-safe: a file is closed when nothing refers to it any more, so not while another thread reads from it. Range
    reads have no shared cursor, so a fork may keep using files that its parent opened.
    """

    def __init__(self, urls: Sequence[str], opened: Callable[[int], Opened], max_open: int) -> None:
        self.urls = urls
        self.max_open = max_open
        self._opened = opened
        self._renew()

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, Opened] = OrderedDict()
        self._pid = os.getpid()
        self._ahead: Fetch | None = None

    def take_from(self, ahead: Fetch | None) -> None:
        """Take responses from requests that were sent ahead."""
        self._renew_after_fork()
        self._ahead = ahead

    def __contains__(self, shard: int) -> bool:
        return shard in self._open

    def fetch(self, url: str, start: int, size: int) -> Response:
        """`remote.fetch`, or its response from a request that was sent ahead."""
        return (self._ahead or fetch)(url, start, size)

    def read(self, shard: int, action: Callable[[Opened], Found]) -> Found:
        """The result of `action` on a shard. Retries storage errors, each time with a newly opened file, since the
        handle of a network file system may never recover; then raises DataLost."""
        try:
            return call(lambda: self._once(shard, action), self.urls[shard])
        except DataMissing as error:  # it existed when the dataset was opened: a mount may have disappeared
            raise DataLost(f"{self.urls[shard]}: cannot be read any more; check the storage") from error

    def _once(self, shard: int, action: Callable[[Opened], Found]) -> Found:
        opened = self._get(shard)
        try:
            return action(opened)
        except BaseException as error:
            # A remote file has no handle, and keeps track of the object's version.
            if verdict(error) is not None and isinstance(opened.file, _LocalFile):
                with self._lock:
                    if self._open.get(shard) is opened:
                        del self._open[shard]
            raise

    def _get(self, shard: int) -> Opened:
        self._renew_after_fork()
        with self._lock:
            opened = self._open.get(shard)
        opened = self._opened(shard) if opened is None else opened
        with self._lock:
            opened = self._open.setdefault(shard, opened)  # another thread may have been first
            self._open.move_to_end(shard)
            while len(self._open) > self.max_open:
                self._open.popitem(last=False)
            return opened

    def _renew_after_fork(self) -> None:
        if self._pid != os.getpid():  # the parent's other threads, which may have held the lock, do not exist
            local = {number: each for number, each in self._open.items() if isinstance(each.file, _LocalFile)}
            self._renew()
            self._open.update(local)

    def __getstate__(self) -> dict:
        # Descriptors and locks cannot be pickled.
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_open", "_pid", "_ahead")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._renew()
