"""Host memory to which a save is copied, so that training continues while it is written."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Slots = Mapping[str, Mapping[str, Tensor]]
"""slot -> parameter -> this rank's slice: 1-D fp32."""


class Staging:
    """A second copy of a rank's slices in host memory: allocated once, pinned if they are on a GPU."""

    def __init__(self, slots: Slots) -> None:
        slices = [(slot, name, tensor) for slot, held in slots.items() for name, tensor in held.items()]
        # Filled, so that its pages are allocated now and not during the first save.
        memory = torch.empty(sum(tensor.numel() for *_, tensor in slices)).fill_(0)
        if any(tensor.is_cuda for *_, tensor in slices):
            _pin(self, memory)
        self._copy: dict[str, dict[str, Tensor]] = {slot: {} for slot in slots}
        start = 0
        for slot, name, tensor in slices:
            self._copy[slot][name] = memory[start : start + tensor.numel()]
            start += tensor.numel()

    def take(self, slots: Slots, behind: torch.cuda.Event | None) -> Slots:
        """Copy the slices; the result is overwritten by the next call. For any thread.

        behind: see `now`. Returns when the copy is complete: the optimizer may then change the slices.
        """
        if behind is None:
            self._copy_all(slots)
            return self._copy
        stream = torch.cuda.Stream(behind.device)
        stream.wait_event(behind)
        with torch.cuda.stream(stream):  # while the next passes run
            self._copy_all(slots)
        stream.synchronize()
        return self._copy

    def _copy_all(self, slots: Slots) -> None:
        for slot, held in slots.items():
            for name, tensor in held.items():
                self._copy[slot][name].copy_(tensor.detach(), non_blocking=True)


def now(slots: Slots) -> torch.cuda.Event | None:
    """The present moment in the stream that changes the slices, if they are on a GPU: a copy may begin then."""
    device = next((tensor.device for held in slots.values() for tensor in held.values() if tensor.is_cuda), None)
    if device is None:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _pin(owner: Staging, memory: Tensor) -> None:
    """Pin `memory` for the lifetime of `owner`. torch's pinned allocator would round its size up to a power of two."""
    runtime: Any = torch.cuda.cudart()
    status = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0) if memory.nbytes else 0
    if int(status):
        log.warning(
            "%.1f GiB of host memory cannot be pinned (CUDA error %d, see `ulimit -l`): saves block steps for longer",
            memory.nbytes / 2**30,
            int(status),
        )
    elif memory.nbytes:
        # Unregister before the memory is freed: the finalizer's arguments keep it alive until then.
        weakref.finalize(owner, lambda held: runtime.cudaHostUnregister(held.data_ptr()), memory)
