"""Placement of FLUX's parts: sharded over the ranks, replicated on every rank, offloaded to host memory, or omitted."""

from __future__ import annotations

import torch
from torch import nn

from ...recipes.schema import Flux
from ..models.flux import PARTS, FluxFolder, FrozenFlux, Part
from .unsharded import build_unsharded, offload, set_unregistered_module


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

    def offload(self, device: torch.device) -> None:
        """Keep the filled weights of offloaded parts in host memory; they compute on `device`."""
        for part, place in self.where.items():
            if place == "offloaded":
                module = getattr(self, part)
                # The VAE's methods call its children, never the module itself.
                for child in module.children() if part == "vae" else (module,):
                    offload(child, device)
