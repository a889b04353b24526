"""Buffers that stay fp32 when their module is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Fp32Buffers(nn.Module):
    """A module whose own buffers move between devices but keep their dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            assert old is not None and new is not None
            self._buffers[name] = new.to(old.dtype) if old.is_meta else old.to(new.device)
        return self
