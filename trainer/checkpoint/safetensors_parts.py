"""The bytes of a safetensors file, from tensors that are read one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


class Piece(NamedTuple):
    """One tensor of a file to write: header known in advance, data read when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def safetensors_parts(pieces: Sequence[Piece]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: the header, then one tensor at a time.

    `safetensors.torch.save` builds the whole file in memory, twice; here only one tensor is on the host at a time.
    Tensors are converted to the declared dtypes. Raises ValueError for a shape other than declared, such as a size-0
    placeholder.
    """
    yield header(pieces)
    yield from map(tensor_bytes, pieces)


def header(pieces: Sequence[Piece]) -> bytes:
    """The bytes of a safetensors file before its tensors, which follow in order of `pieces`."""
    entries, end = {}, 0
    for piece in pieces:
        start, end = end, end + piece.size
        entries[piece.name] = {
            "dtype": _DTYPES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format requires tensor data aligned to eight bytes
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(piece: Piece) -> memoryview:
    """The bytes of one tensor; see `safetensors_parts`."""
    tensor = piece.read().detach()
    if tuple(tensor.shape) != piece.shape:
        raise ValueError(f"{piece.name} has shape {tuple(tensor.shape)}, declared as {piece.shape}")
    tensor = tensor.to(device="cpu", dtype=piece.dtype).contiguous()
    return tensor.flatten().view(torch.uint8).numpy().data
