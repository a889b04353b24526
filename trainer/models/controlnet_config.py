"""The shape of a latent ControlNet, and what it requires of its FLUX."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...recipes.stage2 import ControlLora, FluxLayer
from ..errors import RunError
from ..versions import version

Resampling = Literal["up", "none", "down"]
Norm = Literal["batch", "group"]

SHARED = (
    "patch_size",
    "in_channels",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "axes_dims_rope",
)
"""Settings that the ControlNet inherits from its FLUX."""


def resampling(grid_in: int, grid_out: int) -> Resampling:
    """Resampling of grid_in x grid_in patch latents to grid_out x grid_out FLUX tokens; RunError if there is none."""
    if grid_out == 2 * grid_in:
        return "up"
    if grid_out == grid_in:
        return "none"
    if 2 * grid_out == grid_in:
        return "down"
    raise RunError(
        f"{grid_in} x {grid_in} patch latents cannot be resampled to {grid_out} x {grid_out} FLUX tokens: choose image"
        " sizes whose token grid has twice, once or half the latents' side"
    )


@dataclass(frozen=True)
class ControlNetConfig:
    """Shape of a latent ControlNet. flux: settings inherited from its FLUX; double, single: copied blocks."""

    flux: Mapping[str, Any]
    latent_width: int
    resampling: Resampling
    double: int = 4
    single: int = 1
    norm: Norm = "batch"
    lora: ControlLora | None = None
    """Low-rank pairs on FLUX's own weights in place of copies."""

    @classmethod
    def of(
        cls,
        transformer: Mapping[str, Any],
        latent_width: int,
        grid_in: int,
        grid_out: int,
        double: int = 4,
        single: int = 1,
        norm: Norm = "batch",
    ) -> ControlNetConfig:
        """The shape for a FLUX transformer and patch latents [B, grid_in^2, latent_width]; RunError if none fits."""
        for kind, wanted, there in (
            ("double", double, transformer["num_layers"]),
            ("single", single, transformer["num_single_layers"]),
        ):
            if not 0 <= wanted <= there:
                raise RunError(f"a ControlNet of {wanted} {kind} blocks: this FLUX has {there} to copy from")
        if double + single == 0:
            raise RunError("a ControlNet of 0 double and 0 single blocks has no effect: give it at least one")
        shared = {name: transformer[name] for name in SHARED if name in transformer}
        return cls(shared, latent_width, resampling(grid_in, grid_out), double, single, norm)

    def require_use(self, transformer: Mapping[str, Any]) -> None:
        """RunError if this FLUX ignores some of the residuals: their blocks would never learn."""
        for kind, count, blocks in (
            ("double", self.double, transformer["num_layers"]),
            ("single", self.single, transformer["num_single_layers"]),
        ):
            if count and (added := residuals_added(count, blocks)) < count:
                fits = [n for n in range(1, blocks + 1) if residuals_added(n, blocks) == n]
                near = [max(n for n in fits if n < count), min(n for n in fits if n > count)]
                raise RunError(
                    f"controlnet.{kind}={count}: a FLUX of {blocks} {kind} blocks uses only the first {added}"
                    f" residuals, the other blocks would never learn; set {near[0]} or {near[1]}"
                )

    def public(self) -> dict[str, Any]:
        """`config.json` of a `flux_controlnet` folder. Width, resampling and norm follow from the weights."""
        return {
            "_class_name": "FluxControlNetModel",
            "_diffusers_version": version("diffusers"),
            **self.flux,
            "num_layers": self.double,
            "num_single_layers": self.single,
            "num_mode": None,
            "conditioning_embedding_channels": None,
        }

    def require(self, transformer: Mapping[str, Any], latent_width: int, grid_in: int, grid_out: int) -> None:
        """RunError unless this ControlNet fits these latents and this FLUX."""
        if latent_width != self.latent_width:
            raise RunError(
                f"the ControlNet expects patch latents of width {self.latent_width}, this MLLM has {latent_width}:"
                " use the ControlNet that was trained with it"
            )
        wanted = resampling(grid_in, grid_out)
        if wanted != self.resampling:
            raise RunError(
                f"the ControlNet resamples patch latents by '{self.resampling}', but {grid_in} x {grid_in} latents and"
                f" {grid_out} x {grid_out} FLUX tokens need '{wanted}': change the image sizes"
            )
        for name, value in self.flux.items():
            there = transformer.get(name, value)
            if _plain(there) != _plain(value):
                raise RunError(f"the ControlNet was trained for a FLUX with {name} {value}, this one has {there}")


FRESH = ("controlnet_", "up_sampling_block", "down_sampling_block")
"""Name prefixes of the ControlNet's layers that FLUX does not have."""


def is_shared(name: str) -> bool:
    """Whether a layer or parameter of the ControlNet has a namesake in FLUX, of which it is a copy."""
    return not name.startswith(FRESH)


def layer_kind(name: str) -> FluxLayer:
    """The kind of a linear layer that FLUX has too."""
    if not name.startswith(("transformer_blocks.", "single_transformer_blocks.")):
        return "embedders"
    if ".norm" in name:
        return "modulation"
    return "mlp" if ".ff" in name or name.endswith(("proj_mlp", "proj_out")) else "attention"


def residuals_added(count: int, blocks: int) -> int:
    """How many of `count` residuals a FLUX of `blocks` blocks adds: number i // ceil(blocks / count) after block i, as
    in diffusers' FluxTransformer2DModel."""
    return (blocks - 1) // math.ceil(blocks / count) + 1


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
