"""Where frozen parts lie: cut over the ranks, whole on every rank, in host memory, or not at all.

Parts that are not cut are built after `zero.Init` and kept out of the module tree, so that DeepSpeed neither cuts nor
moves them; gradients flow through them like through any other module.
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


def places(flux: Flux, whole: bool = False) -> dict[Part, str]:
    """Part -> its placement. whole: cached parts too are needed, and go to host memory."""
    asked = flux.placement
    found: dict[Part, str] = {
        "transformer": asked.transformer,
        "vae": asked.vae,
        "text_encoder": asked.text,
        "text_encoder_2": asked.text,
    }
    return {part: "offloaded" if whole and place == "cached" else place for part, place in found.items()}


def build_whole(build: Callable[[], Module], place: str, like: nn.Parameter) -> Module:
    """A frozen module outside of the module tree, in the dtype of `like`, `replicated` on its device or `offloaded`."""
    device = weights.local_slice(like)[0].device
    with born(device if place == "replicated" else torch.device("cpu"), like.dtype):
        return build().requires_grad_(False).eval()


def hide(owner: nn.Module, name: str, module: nn.Module) -> None:
    """Make `module` an attribute of `owner` that is none of its submodules."""
    owner.__dict__[name] = module


def offload(module: nn.Module, device: torch.device) -> None:
    """Keep the module's filled parameters in host memory; they are on `device` only while it computes."""
    parameters = list(module.parameters())
    if device.type == "cuda":
        for parameter in parameters:
            parameter.data = parameter.data.pin_memory()
    at_home = [parameter.data for parameter in parameters]
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(device))

    def arrive(*_: object) -> None:
        for parameter, home in zip(parameters, at_home, strict=True):
            parameter.data = home.to(device, non_blocking=True, copy=True)

    def leave(*_: object) -> None:
        for parameter, home in zip(parameters, at_home, strict=True):
            parameter.data = home

    module.register_forward_pre_hook(arrive)
    module.register_forward_hook(leave, always_call=True)


class PlacedFlux(FrozenFlux):
    """A FLUX whose parts lie where the recipe wants them; cached ones are None."""

    def __init__(self, folder: FluxFolder, where: dict[Part, str]) -> None:
        super().__init__(folder, [part for part in PARTS if where[part] == "sharded"])
        self.where = where

    def build_rest(self, like: nn.Parameter) -> None:
        """Build the parts that are not cut, outside of `zero.Init`; see `build_whole`."""
        for part, place in self.where.items():
            if place in ("replicated", "offloaded"):
                hide(self, part, build_whole(lambda part=part: self.folder.build(part), place, like))

    def load(self, device: torch.device | None = None) -> None:
        """Fill the weights; offloaded parts compute on `device`."""
        super().load()
        for part, place in self.where.items():
            if place == "offloaded":
                assert device is not None
                module = getattr(self, part)
                # The VAE's own methods call its children, never itself.
                for child in module.children() if part == "vae" else (module,):
                    offload(child, device)


@contextmanager
def born(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules built inside have their parameters on `device` in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
