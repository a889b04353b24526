"""Frozen parts in host memory, on the phantom device: their weights are fake, too. So they take no memory here, and can
change their device, which a tensor with values cannot."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ..stages import controlnet_model, placement
from ..stages.unsharded import build_unsharded
from .mode import Phantom


@contextmanager
def host_parts(mode: Phantom) -> Iterator[None]:
    """Within it, offloaded parts are built of fake tensors. Afterwards `parameter.data = …` still moves fake ones."""

    def build(part: Callable[[], nn.Module], place: str, like: nn.Parameter) -> nn.Module:
        with mode.fake_host(place == "offloaded"):
            return build_unsharded(part, place, like)

    _move_by_data()
    with patch.object(placement, "build_unsharded", build), patch.object(controlnet_model, "build_unsharded", build):
        yield


@functools.cache
def _move_by_data() -> None:
    """Let `tensor.data = other` change the device of a fake tensor, which keeps it next to what torch changes."""
    tensor: Any = torch.Tensor
    data: Any = tensor.data

    def set_data(self: torch.Tensor, value: torch.Tensor) -> None:
        data.__set__(self, value)
        if isinstance(self, FakeTensor) and isinstance(value, FakeTensor):
            self.fake_device = value.fake_device

    tensor.data = property(data.__get__, set_data)
