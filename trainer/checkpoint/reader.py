"""Reads a checkpoint: any range of any parameter, independent of the number of ranks that saved it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...data.retry import call
from ...recipes import with_new_names
from ..errors import RunError
from ..models.safetensors_files import StoredTensors
from .durable import WINDOW, formatted, new_hash
from .layout import rank_file, reads
from .manifest import read_manifest
from .verification import DAMAGED

STATE = "state.json"
BUFFERS = "buffers.safetensors"
AVERAGED = "ema/"
"""Name prefix of buffers that belong to the averaged weights."""

log = logging.getLogger(__name__)

_BLOCK = 1 << 18  # elements read and hashed at a time, from the core's cache


class CheckpointReader:
    """A checkpoint folder, opened lazily; `Store.newest_verified` returns verified ones.

    own: rank whose tensors are not verified yet, which only `load` reads, on that rank; None if all are verified.
    Raises RunError if the folder has no valid manifest; other files are not checked here.
    """

    def __init__(self, folder: str | Path, own: int | None = None):
        self.folder = Path(folder)
        self.own = own
        self.manifest = read_manifest(self.folder)
        self.step = self.manifest.step
        self.ranks = self.manifest.ranks
        self.slots = self.manifest.slots
        self.shapes = self.manifest.shapes
        self._files: dict[int, StoredTensors] = {}
        self._memory = torch.empty(0)  # reused, as new pages cost more than the copy

    @cached_property
    def state(self) -> dict[str, Any]:
        """State of the run other than its tensors: positions, counters, hash of the frozen base, and its
        recipe, whose settings have today's names."""
        state = json.loads(call(lambda: (self.folder / STATE).read_bytes(), self.folder / STATE))
        return {**state, "recipe": with_new_names(state["recipe"])} if "recipe" in state else state

    def read(self, slot: str, name: str, lo: int, hi: int) -> torch.Tensor:
        """Elements [lo, hi) of the flattened parameter: [hi - lo], fp32, on the CPU; see `fill`."""
        result = torch.empty(hi - lo)
        self.fill(result, slot, name, lo)
        return result

    def fill(self, out: torch.Tensor, slot: str, name: str, lo: int) -> None:
        """Set `out`, 1-D, on any device, to the elements from `lo` of the flattened parameter; only those bytes are
        read, straight into a contiguous fp32 tensor on the CPU.

        Raises RunError for a missing slot or parameter, IndexError for a range outside the parameter.
        """
        assert self.own is None, "not verified"
        self._require(slot, name)
        pieces = reads(math.prod(self.shapes[name]), lo, lo + len(out), self.ranks)
        target = self._readable(out)
        for piece in pieces:
            part = target[piece.at : piece.at + piece.stop - piece.start]
            self._file(piece.rank).fill(part, f"{slot}/{name}", piece.start)
        if target is not out:
            out.copy_(target)

    def load(self, slot: str, slices: Mapping[str, tuple[torch.Tensor, int]]) -> str | None:
        """Set the slices of all parameters of a slot, by name: each a 1-D tensor and its first element in the flattened
        parameter. Every byte is read once, and hashed on its way if it was not verified before.

        Returns what is wrong with the file, or None. If something is, the slices must not be used.
        """
        for name in slices:
            self._require(slot, name)
        if self.own is None:
            for name, (tensor, lo) in slices.items():
                self.fill(tensor, slot, name, lo)
            return None
        file, stored = rank_file(self.own), self._file(self.own)
        span = self.manifest.files[file].spans[slot]
        digest, end = new_hash(span.hash), span.start
        ahead = span.start  # up to where the file is being read
        for name, (tensor, _) in sorted(slices.items(), key=lambda item: stored.place(f"{slot}/{item[0]}")):
            size = len(tensor) * torch.float32.itemsize
            assert stored.place(f"{slot}/{name}") == (end, size), "not the slices of this rank"
            for lo in range(0, len(tensor), _BLOCK):
                at = end + lo * torch.float32.itemsize
                if at + WINDOW > ahead:
                    stored.read_ahead(f"{slot}/{name}", ahead - end, 2 * WINDOW)
                    ahead += 2 * WINDOW
                block = tensor[lo : lo + _BLOCK]
                digest.update(self._fill_own(block, f"{slot}/{name}", lo).view(torch.uint8).numpy().data)
            end += size
        assert end == span.start + span.size, "not all slices of this rank"
        if formatted(digest) == span.hash:
            return None
        return f"{self.folder.name}/{file}: {DAMAGED}"

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

    def _fill_own(self, out: torch.Tensor, name: str, lo: int) -> torch.Tensor:
        """Set `out` to elements of a stored tensor of this rank; returns a tensor on the CPU with their bytes."""
        assert self.own is not None
        target = self._readable(out)
        self._file(self.own).fill(target, name, lo)
        if target is not out:
            out.copy_(target)
        return target

    def _readable(self, out: torch.Tensor) -> torch.Tensor:
        """`out` if it can be read into, else memory of its size."""
        if out.device.type == "cpu" and out.dtype == torch.float32 and out.is_contiguous():
            return out
        if len(self._memory) < len(out):
            self._memory = torch.empty(len(out))
        return self._memory[: len(out)]

    def _require(self, slot: str, name: str) -> None:
        if slot not in self.slots:
            raise RunError(f"{self.folder} holds no {slot}, only {', '.join(self.slots)}")
        if name not in self.shapes:
            raise RunError(f"{self.folder} holds no parameter {name}: was it saved by another model or recipe?")

    def _file(self, rank: int) -> StoredTensors:
        if rank not in self._files:
            self._files[rank] = StoredTensors([self.folder / rank_file(rank)])
        return self._files[rank]
