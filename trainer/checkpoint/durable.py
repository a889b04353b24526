"""Files that are on the disk when the call returns, hashed from memory while they are written."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_BLOCK = 1 << 24  # bytes hashed and written at a time


@dataclass(frozen=True)
class Span:
    """A part of a file: where it starts, its size in bytes and its content's SHA-256 in hex."""

    start: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """What a file must be: its size in bytes and its content's SHA-256 in hex."""

    size: int
    sha256: str
    spans: dict[str, Span] | None = field(default=None, compare=False)
    """Parts that are verified alone, by name; None in files that have none, and in checkpoints from before there were
    any."""


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> Entry:
    """Write `parts` one after the other, flush to the disk, and return what was written.

    The hash is taken from memory, not read back: a disk that stores something else is found out by `hash_file`.
    Raises OSError.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part).cast("B")
                for start in range(0, len(view), _BLOCK):
                    block = view[start : start + _BLOCK]
                    digest.update(block)
                    while block:  # an unbuffered write may take less than it was given
                        block = block[file.write(block) :]
                size += len(view)
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is reported by `write`, which knows no name
        raise
    return Entry(size, digest.hexdigest())


def hash_file(path: Path) -> Entry:
    """Size and hash of what the disk holds. Raises OSError."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
        return Entry(file.tell(), digest.hexdigest())


def hash_span(path: Path, start: int, size: int) -> str:
    """Hash of a part of what the disk holds; nothing else is read. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while size > 0 and (block := file.read(min(_BLOCK, size))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


class Spans:
    """Hashes parts of a file while it is written: `found` has them, by name, once `over` is exhausted."""

    def __init__(self) -> None:
        self.found: dict[str, Span] = {}

    def over(self, names: Iterable[str], parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        """`parts`, each of the span that `names` gives; those of one span follow one another."""
        start = 0
        for name, group in itertools.groupby(zip(names, parts, strict=True), key=lambda pair: pair[0]):
            digest, size = hashlib.sha256(), 0
            for _, part in group:
                digest.update(part)
                size += memoryview(part).nbytes
                yield part
            self.found[name] = Span(start, size, digest.hexdigest())
            start += size


def sync_folder(path: Path) -> None:
    """Flush a folder's own entries (names made, renamed, removed) to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


class Piece(NamedTuple):
    """One tensor of a file to write: known by its header, read when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def safetensors_parts(pieces: Sequence[Piece]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, header first, then one tensor at a time.

    `safetensors.torch.save` builds the whole file in memory, twice; here one tensor is on the host at a time. Types
    are converted to the announced ones. ValueError for another shape than announced, such as a size-0 placeholder.
    """
    header, end = {}, 0
    for piece in pieces:
        start, end = end, end + piece.size
        header[piece.name] = {
            "dtype": _DTYPES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for tensor data that starts on a multiple of eight bytes
    yield len(text).to_bytes(8, "little") + text
    for piece in pieces:
        tensor = piece.read().detach()
        if tuple(tensor.shape) != piece.shape:
            raise ValueError(f"{piece.name} has shape {tuple(tensor.shape)}, announced as {piece.shape}")
        tensor = tensor.to(device="cpu", dtype=piece.dtype).contiguous()
        yield tensor.flatten().view(torch.uint8).numpy().data
