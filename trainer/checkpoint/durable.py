"""Files that are on the disk when the call returns, hashed from memory while they are written."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_BLOCK = 1 << 24  # bytes hashed and written at a time


@dataclass(frozen=True)
class Entry:
    """What a file must be: its size in bytes and its content's SHA-256 in hex."""

    size: int
    sha256: str


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
