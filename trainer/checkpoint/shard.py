"""One rank's shard of a checkpoint: its files, and rank 0's metadata of the whole checkpoint."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..errors import RunError
from .durable import WHOLE, Entry, write_file
from .layout import local_range, rank_file
from .reader import BUFFERS, STATE
from .safetensors_parts import Piece, header, tensor_bytes
from .staging import Slots
from .verification import HEADER

COMPLETE = ("master", "ema")
"""Slots that have every parameter."""


class ShardMetadata(NamedTuple):
    """Fields of a manifest other than its files."""

    ranks: int
    slots: list[str]
    shapes: dict[str, tuple[int, ...]]


class Shard(NamedTuple):
    """Files that a rank wrote to the folder of a save in progress; `metadata` only from rank 0."""

    files: dict[str, Entry]
    metadata: ShardMetadata | None


@dataclass(frozen=True)
class Payload:
    """What one rank saves. `slots[slot][name]` is its slice of that parameter: 1-D fp32, without padding, possibly
    empty; slots of optimizer state have only the parameters that have this state. shapes: of the full parameters. Rank
    0 also writes `state` (JSON) and `buffers`."""

    rank: int
    ranks: int
    slots: Slots
    shapes: Mapping[str, tuple[int, ...]]
    state: Mapping[str, Any]
    buffers: Mapping[str, Tensor]

    def write(self, folder: Path) -> Shard:
        """Write this rank's files into `folder`. Raises OSError, or RunError for mismatched slices."""
        pieces = self.pieces()
        folder.mkdir(exist_ok=True)
        spans: dict[str, Iterable[bytes | memoryview]] = {HEADER: [header(pieces)]}
        for slot, own in itertools.groupby(pieces, key=lambda piece: piece.name.partition("/")[0]):
            spans[slot] = map(tensor_bytes, list(own))
        files = {rank_file(self.rank): write_file(folder / rank_file(self.rank), spans)}
        if self.rank:
            return Shard(files, None)
        files[STATE] = write_file(folder / STATE, {WHOLE: [json.dumps(self.state, indent=1).encode()]})
        if self.buffers:
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in self.buffers.items()}
            files[BUFFERS] = write_file(folder / BUFFERS, {WHOLE: [safetensors_bytes(held)]})
        return Shard(files, self.metadata())

    def metadata(self) -> ShardMetadata:
        """Metadata of the whole checkpoint, equal on all ranks."""
        return ShardMetadata(self.ranks, list(self.slots), dict(self.shapes))

    def pieces(self) -> list[Piece]:
        pieces = []
        for slot, slices in self.slots.items():
            odd = sorted(slices.keys() ^ self.shapes.keys() if slot in COMPLETE else slices.keys() - self.shapes.keys())
            if odd:
                raise RunError(f"slot {slot} and the shapes do not name the same parameters: {', '.join(odd[:5])}")
            for name, tensor in slices.items():
                lo, hi = local_range(torch.Size(self.shapes[name]).numel(), self.rank, self.ranks)
                if tensor.numel() != hi - lo:
                    raise RunError(f"{slot}/{name} has {tensor.numel()} elements, its slice has {hi - lo}")
                if tensor.dtype != torch.float32 or tensor.dim() != 1:
                    raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not a flat fp32 slice")
                pieces.append(Piece(f"{slot}/{name}", tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor))
        return pieces
