"""Durable file writes: flushed to disk on return, hashed from memory while being written."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_BLOCK = 1 << 24  # bytes hashed and written at a time


@dataclass(frozen=True)
class Span:
    """A byte range of a file: start, size, and the SHA-256 of its content in hex."""

    start: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """Expected file: size in bytes, and the SHA-256 of its content in hex."""

    size: int
    sha256: str
    spans: dict[str, Span] | None = field(default=None, compare=False)
    """Ranges that can be verified separately, by name; None for files without any, and in older checkpoints."""


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> Entry:
    """Write `parts` in order, flush to disk, and return size and hash.

    The hash is computed from memory, not read back: `hash_file` detects a disk that stored something else. Raises
    OSError.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part).cast("B")
                for start in range(0, len(view), _BLOCK):
                    block = view[start : start + _BLOCK]
                    digest.update(block)
                    while block:  # an unbuffered write may be partial
                        block = block[file.write(block) :]
                size += len(view)
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # `write` reports a full disk without a file name
        raise
    return Entry(size, digest.hexdigest())


def read_blocks(path: Path, start: int = 0, size: float = math.inf) -> Iterator[bytes]:
    """Content of a byte range of a file, by default all of it; nothing else is read. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while size > 0 and (block := file.read(int(min(_BLOCK, size)))):
            yield block
            size -= len(block)


def hash_file(path: Path, start: int = 0, size: float = math.inf) -> Entry:
    """Size and hash of a byte range of a file on disk, by default all of it. Raises OSError."""
    digest, found = hashlib.sha256(), 0
    for block in read_blocks(path, start, size):
        digest.update(block)
        found += len(block)
    return Entry(found, digest.hexdigest())


class Spans:
    """Hashes named ranges of a file while it is written; `found` is complete once `over` is exhausted."""

    def __init__(self) -> None:
        self.found: dict[str, Span] = {}

    def over(self, names: Iterable[str], parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        """Yield `parts`, each belonging to the span named in `names`; parts of a span are consecutive."""
        start = 0
        for name, group in itertools.groupby(zip(names, parts, strict=True), key=lambda pair: pair[0]):
            digest, size = hashlib.sha256(), 0
            for _, part in group:
                digest.update(part)
                size += memoryview(part).nbytes
                yield part
            self.found[name] = Span(start, size, digest.hexdigest())
            start += size
