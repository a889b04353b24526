"""One rank's part of a checkpoint: the files that it brings, and what rank 0 says about the whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ...data.retry import retrying
from ..errors import RunError
from .durable import Entry, Piece, Spans, hash_file, hash_span, safetensors_parts, write_file
from .layout import local_range
from .reader import BUFFERS, STATE, rank_file
from .staging import Slots

HEADER = "header"
"""Name of the span in front of the slots in a rank's file."""


class About(NamedTuple):
    """What a manifest says beside its files."""

    ranks: int
    slots: list[str]
    shapes: dict[str, tuple[int, ...]]


class Part(NamedTuple):
    """What lies in the folder of a save under way; `about` from rank 0 alone."""

    files: dict[str, Entry]
    about: About | None


@dataclass(frozen=True)
class Content:
    """What one rank saves. `slots[slot][name]` is its slice of that parameter: 1-D fp32, without padding, possibly
    empty; `shapes` are the whole parameters' shapes; `state` (JSON) and `buffers` are rank 0's to write."""

    rank: int
    ranks: int
    slots: Slots
    shapes: Mapping[str, tuple[int, ...]]
    state: Mapping[str, Any]
    buffers: Mapping[str, Tensor]

    def write(self, folder: Path) -> Part:
        """Write this rank's files into `folder`. Raises OSError, RunError for slices that do not fit the shapes."""
        pieces = self.pieces()
        folder.mkdir(exist_ok=True)
        spans = Spans()
        names = [HEADER, *(piece.name.partition("/")[0] for piece in pieces)]
        entry = write_file(folder / rank_file(self.rank), spans.over(names, safetensors_parts(pieces)))
        files = {rank_file(self.rank): replace(entry, spans=spans.found)}
        if self.rank:
            return Part(files, None)
        files[STATE] = write_file(folder / STATE, [json.dumps(self.state, indent=1).encode()])
        if self.buffers:
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in self.buffers.items()}
            files[BUFFERS] = write_file(folder / BUFFERS, [safetensors_bytes(held)])
        return Part(files, self.about())

    def about(self) -> About:
        """What every rank knows alike of the whole."""
        return About(self.ranks, list(self.slots), dict(self.shapes))

    def pieces(self) -> list[Piece]:
        pieces = []
        for slot, slices in self.slots.items():
            if slices.keys() != self.shapes.keys():
                odd = sorted(slices.keys() ^ self.shapes.keys())
                raise RunError(f"slot {slot} and the shapes do not name the same parameters: {', '.join(odd[:5])}")
            for name, tensor in slices.items():
                lo, hi = local_range(torch.Size(self.shapes[name]).numel(), self.rank, self.ranks)
                if tensor.numel() != hi - lo:
                    raise RunError(f"{slot}/{name} has {tensor.numel()} elements, its slice has {hi - lo}")
                if tensor.dtype != torch.float32 or tensor.dim() != 1:
                    raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not a flat fp32 slice")
                pieces.append(Piece(f"{slot}/{name}", tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor))
        return pieces


def _same(path: Path, entry: Entry, slot: str | None) -> bool:
    if slot is None or not entry.spans or slot not in entry.spans:
        return hash_file(path) == entry
    spans = (entry.spans[HEADER], entry.spans[slot])
    return all(hash_span(path, span.start, span.size) == span.sha256 for span in spans)


def file_problem(path: Path, entry: Entry, content: bool, slot: str | None = None) -> str | None:
    """What is wrong with a file, or None; its bytes are read only when its size is right and `content` is set.

    slot: of a rank's file only the header and this slot are read, where the manifest knows their hashes.
    """
    try:
        size = path.stat().st_size
        if size < entry.size:
            return f"truncated, {size} of {entry.size} bytes"
        if size > entry.size:
            return f"too long, {size} bytes where the manifest says {entry.size}"
        if content and not retrying(lambda: _same(path, entry, slot), path):
            return "damaged, its content does not match the manifest's sha256"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable, {error.strerror}"
    return None
