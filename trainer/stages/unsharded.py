"""Frozen modules that are not sharded: replicated on every rank, or offloaded to host memory.

They are built after `zero.Init` and kept out of the module tree, so that DeepSpeed neither shards nor moves them;
gradients flow through them as through any other module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..models import weights

Module = TypeVar("Module", bound=nn.Module)
BLOCK = 512 * 2**20
"""Bytes of a block of offloaded parameters, a power of two."""
ALIGNMENT = 512
"""Bytes; of each parameter in its block."""


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
        move_to_blocks(parameters, lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True))
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


def move_to_blocks(parameters: Sequence[nn.Parameter], allocate: Callable[[int], Tensor]) -> None:
    """Move the parameters' data to few large blocks of host memory from `allocate`, which takes bytes.

    torch rounds every pinned allocation up to a power of two: one by one, the 22 GiB of FLUX.1-dev would take
    1.56 times as much; in blocks they take 1.07 times.
    """
    waiting: list[tuple[nn.Parameter, int]] = []
    used = 0

    def flush() -> None:
        block = allocate(used) if used else None
        for parameter, start in waiting:
            assert block is not None
            data = block[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
            parameter.data = data.copy_(parameter.data)
        waiting.clear()

    for parameter in parameters:
        if used + parameter.nbytes > BLOCK:
            flush()
            used = 0
        waiting.append((parameter, used))
        used += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    flush()


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
