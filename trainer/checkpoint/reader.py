"""Reads a checkpoint: any range of any parameter, independent of the number of ranks that saved it."""

from __future__ import annotations

import json
import logging
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...data.retry import call
from ...recipes import with_new_names
from ..errors import RunError
from ..models.safetensors_files import StoredTensors
from .layout import reads
from .manifest import read_manifest

STATE = "state.json"
BUFFERS = "buffers.safetensors"
AVERAGED = "ema/"
"""Name prefix of buffers that belong to the averaged weights."""

log = logging.getLogger(__name__)


def rank_file(rank: int) -> str:
    """Name of the file written by `rank`."""
    return f"rank-{rank:05d}.safetensors"


class CheckpointReader:
    """A checkpoint folder, opened lazily; `Store.newest_verified` returns verified ones.

    Raises RunError if the folder has no valid manifest; other files are not checked here.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.step = self.manifest.step
        self.ranks = self.manifest.ranks
        self.slots = self.manifest.slots
        self.shapes = self.manifest.shapes
        self._files: dict[int, StoredTensors] = {}

    @cached_property
    def state(self) -> dict[str, Any]:
        """State of the run other than its tensors: positions, counters, hash of the frozen base, and its
        recipe, whose settings have today's names."""
        state = json.loads(call(lambda: (self.folder / STATE).read_bytes(), self.folder / STATE))
        return {**state, "recipe": with_new_names(state["recipe"])} if "recipe" in state else state

    def read(self, slot: str, name: str, lo: int, hi: int) -> torch.Tensor:
        """Elements [lo, hi) of the flattened parameter: [hi - lo], fp32, on the CPU; only those bytes are read.

        Raises RunError for a missing slot or parameter, IndexError for a range outside the parameter.
        """
        if slot not in self.slots:
            raise RunError(f"{self.folder} holds no {slot}, only {', '.join(self.slots)}")
        if name not in self.shapes:
            raise RunError(f"{self.folder} holds no parameter {name}: was it saved by another model or recipe?")
        pieces = reads(math.prod(self.shapes[name]), lo, hi, self.ranks)
        result = torch.empty(hi - lo)
        for piece in pieces:
            saved = self._file(piece.rank).flat(f"{slot}/{name}", piece.start, piece.stop)
            result[piece.at : piece.at + piece.stop - piece.start] = saved
        return result

    def full(self, slot: str, name: str) -> torch.Tensor:
        """The full parameter in its shape, fp32, on the CPU."""
        shape = self.shapes[name]
        return self.read(slot, name, 0, math.prod(shape)).view(shape)

    def buffers(self, slot: str = "master") -> dict[str, torch.Tensor]:
        """Saved buffers by name, on the CPU: those of the live weights, or with slot `ema` of the averaged ones.

        An older checkpoint without averaged buffers returns the live ones and logs a warning.
        """
        path = self.folder / BUFFERS
        stored = StoredTensors([path] if BUFFERS in self.manifest.files else [])
        held = {name: stored.tensor(name) for name in stored}
        live = {name: buffer for name, buffer in held.items() if not name.startswith(AVERAGED)}
        if slot != "ema":
            return live
        if live and len(live) == len(held):
            log.warning("%s holds no averaged BatchNorm statistics: those of the live weights are used", self.folder)
            return live
        return {name.removeprefix(AVERAGED): buffer for name, buffer in held.items() if name.startswith(AVERAGED)}

    def _file(self, rank: int) -> StoredTensors:
        if rank not in self._files:
            self._files[rank] = StoredTensors([self.folder / rank_file(rank)])
        return self._files[rank]
