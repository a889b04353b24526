"""Durable file writes: flushed to disk on return, hashed from memory while being written."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WHOLE = "file"
"""Name of the span of a file that is hashed as a whole."""
HASH = "xxh3_128"
"""Hash of new files: as fast as memory, against damage; a manifest does not protect from who may rewrite it."""


def _xxh3() -> Any:
    import xxhash  # here: only checkpoints need it, not an exported pipeline

    return xxhash.xxh3_128()


HASHES: Mapping[str, Callable[[], Any]] = {HASH: _xxh3, "sha256": hashlib.sha256}
"""Name -> new hash; checkpoints of format 1 have SHA-256."""

WINDOW = 1 << 23
"""Bytes for which the kernel is asked ahead: to write them to disk, or to read them from it."""

_BLOCK = 1 << 20  # bytes hashed and copied at a time: the second pass finds them in the core's cache
_SYNC_FILE_RANGE_WRITE = 2


@dataclass(frozen=True)
class Span:
    """A byte range of a file: start, size, and the hash of its content as `NAME:HEX`."""

    start: int
    size: int
    hash: str


@dataclass(frozen=True)
class Entry:
    """Expected file: size in bytes, and spans that cover it, by name, each of which can be verified separately."""

    size: int
    spans: dict[str, Span]

    @property
    def algorithm(self) -> str:
        """The hash of its spans, which is the same for all."""
        return next(iter(self.spans.values())).hash.partition(":")[0]


def new_hash(name: str) -> Any:
    """An empty hash, by its name or by a value `NAME:HEX`."""
    return HASHES[name.partition(":")[0]]()


def formatted(digest: Any) -> str:
    """The value of a hash as `NAME:HEX`."""
    return f"{digest.name.lower()}:{digest.hexdigest()}"


def write_file(path: Path, content: Mapping[str, Iterable[bytes | memoryview]], algorithm: str = HASH) -> Entry:
    """Write the spans of `content`, each in parts, in order; flush to disk, and return size and hashes.

    The hashes are computed from memory, not read back: `is_intact` detects a disk that stored something else. Raises
    OSError.
    """
    spans, end = {}, 0
    try:
        with open(path, "wb", buffering=0) as file:
            flushed = 0
            for name, parts in content.items():
                start, digest = end, new_hash(algorithm)
                for part in parts:
                    view = memoryview(part).cast("B")
                    for lo in range(0, len(view), _BLOCK):
                        block = view[lo : lo + _BLOCK]
                        digest.update(block)
                        end += len(block)
                        while block:  # an unbuffered write may be partial
                            block = block[file.write(block) :]
                        if end - flushed >= WINDOW:
                            _start_flush(file.fileno(), flushed, end)
                            flushed = end
                spans[name] = Span(start, end - start, formatted(digest))
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # `write` reports a full disk without a file name
        raise
    return Entry(end, spans)


def read_blocks(path: Path, start: int, size: int) -> Iterator[memoryview]:
    """Content of a byte range of a file, which may end early; nothing else is read. Each block is overwritten by the
    next one. Raises OSError."""
    memory = memoryview(bytearray(min(_BLOCK, size)))
    end = start + size
    with open(path, "rb", buffering=0) as file:
        ahead = start
        while start < end:
            if start >= ahead and hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(file.fileno(), start, min(2 * WINDOW, end - start), os.POSIX_FADV_WILLNEED)
                ahead = start + WINDOW
            count = os.preadv(file.fileno(), [memory[: end - start]], start)
            if not count:
                return
            yield memory[:count]
            start += count


def sha256(path: Path) -> str:
    """The SHA-256 of a whole file, of which one block at a time is in memory. Raises OSError."""
    digest = hashlib.sha256()
    for block in read_blocks(path, 0, path.stat().st_size):
        digest.update(block)
    return digest.hexdigest()


def is_intact(path: Path, spans: Iterable[Span]) -> bool:
    """Whether each span of a file on disk has its hash; nothing else is read. Raises OSError."""
    return all(_hashed(path, span) == span.hash for span in spans)


def _hashed(path: Path, span: Span) -> str:
    digest = new_hash(span.hash)
    for block in read_blocks(path, span.start, span.size):
        digest.update(block)
    return formatted(digest)


def _start_flush(descriptor: int, start: int, end: int) -> None:
    """Let the kernel write a range to disk while the next one is hashed and copied: fsync then waits for less. Only a
    hint: errors of the disk are fsync's."""
    if flush := _sync_file_range():
        flush(descriptor, start, end - start, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Any:
    """Linux's sync_file_range, which Python lacks; None elsewhere."""
    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is not None:
        found.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return found
