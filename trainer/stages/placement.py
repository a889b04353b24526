"""Placement of frozen parts: sharded over the ranks, replicated on every rank, offloaded to host memory, or omitted.

Parts that are not sharded are built after `zero.Init` and kept out of the module tree, so that DeepSpeed neither shards
nor moves them; gradients flow through them as through any other module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from ...recipes.schema import Flux
from ..models import weights
from ..models.flux import PARTS, FluxFolder, FrozenFlux, Part

Module = TypeVar("Module", bound=nn.Module)


def placements(flux: Flux, whole: bool = False) -> dict[Part, str]:
    """Part -> its placement. whole: cached parts are needed too, and are offloaded."""
    asked = flux.placement
    found: dict[Part, str] = {
        "transformer": asked.transformer,
        "vae": asked.vae,
        "text_encoder": asked.text,
        "text_encoder_2": asked.text,
    }
    return {part: "offloaded" if whole and place == "cached" else place for part, place in found.items()}


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


class PlacedFlux(FrozenFlux):
    """A FLUX whose parts are placed as in the recipe; cached ones are None."""

    def __init__(self, folder: FluxFolder, where: dict[Part, str]) -> None:
        super().__init__(folder, [part for part in PARTS if where[part] == "sharded"])
        self.where = where

    def build_rest(self, like: nn.Parameter) -> None:
        """Build the parts that are not sharded, outside `zero.Init`; see `build_unsharded`."""
        for part, place in self.where.items():
            if place in ("replicated", "offloaded"):
                set_unregistered_module(
                    self, part, build_unsharded(lambda part=part: self.folder.build(part), place, like)
                )

    def load(self, device: torch.device | None = None) -> None:
        """Fill the weights; offloaded parts compute on `device`."""
        super().load()
        for part, place in self.where.items():
            if place == "offloaded":
                assert device is not None
                module = getattr(self, part)
                # The VAE's methods call its children, never the module itself.
                for child in module.children() if part == "vae" else (module,):
                    offload(child, device)


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
