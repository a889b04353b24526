"""Bytes of the device's tensors that are alive, and their peak."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

BLOCK = 512
"""torch's allocator rounds every size up to a multiple of it, in bytes."""


class Memory:
    """Storages on the device, each counted once, from its first tensor until its last one is gone.

    live, peak: bytes.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def restart(self) -> None:
        """Measure the peak from now on."""
        self.peak = self.live

    def saw(self, result: Any) -> None:
        """Count the storages of an operator's result that are not counted yet."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and on_device(tensor):
                self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = -(-storage.nbytes() // BLOCK) * BLOCK
        self.live += self._sizes[key]
        weakref.finalize(storage, self._remove, key).atexit = False
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def on_device(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"
