"""Frozen modules that are not sharded: replicated on every rank, or offloaded to host memory.

They are built after `zero.Init` and kept out of the module tree, so that DeepSpeed neither shards nor moves them;
gradients flow through them as through any other module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from ..models import weights

Module = TypeVar("Module", bound=nn.Module)


def build_unsharded(build: Callable[[], Module], place: str, like: nn.Parameter) -> Module:
    """A frozen module outside the module tree, in the dtype of `like`, `replicated` on its device or `offloaded`."""
    device = weights.local_slice(like)[0].device
    with init_context(device if place == "replicated" else torch.device("cpu"), like.dtype):
        return build().requires_grad_(False).eval()


def set_unregistered_module(owner: nn.Module, name: str, module: nn.Module) -> None:
    """Make `module` an attribute of `owner` without registering it as a submodule."""
    owner.__dict__[name] = module


def offload(module: nn.Module, device: torch.device) -> None:
    """Keep the module's filled parameters in host memory; they are on `device` only during its forward pass."""
    parameters = list(module.parameters())
    if device.type == "cuda":
        for parameter in parameters:
            parameter.data = parameter.data.pin_memory()
    host_data = [parameter.data for parameter in parameters]
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(device))

    def copy_to_device(*_: object) -> None:
        for parameter, data in zip(parameters, host_data, strict=True):
            parameter.data = data.to(device, non_blocking=True, copy=True)

    def free_device_copy(*_: object) -> None:
        for parameter, data in zip(parameters, host_data, strict=True):
            parameter.data = data

    module.register_forward_pre_hook(copy_to_device)
    module.register_forward_hook(free_device_copy, always_call=True)


@contextmanager
def init_context(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules built in this context have their parameters on `device` in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
