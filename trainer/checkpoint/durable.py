"""Files that are on the disk when the call returns, hashed from memory while they are written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

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
        error.filename = str(path)  # a full disk is reported by `write`, which does not know the name
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
    finally:
        os.close(descriptor)


def safetensors_parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of 1-D fp32 tensors, header first, then one tensor at a time.

    `safetensors.torch.save` builds the whole file in memory, twice; this copies one tensor from its device at a time.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.dim() != 1:
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not a flat fp32 slice")
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for tensor data that starts on a multiple of eight bytes
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().numpy().data
