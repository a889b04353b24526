"""The shape of a bridge that gives FLUX patch latents as additional text tokens, and of any bridge of stage 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...recipes.stage2 import Connector, ControlNet
from ..errors import RunError
from .controlnet_config import ControlNetConfig

HEAD = 64
"""Least width of a head of the connector's attention, if the connector is that wide."""
MLP = 4
"""Width of the connector's MLPs, in units of its width."""


@dataclass(frozen=True)
class TextBridgeConfig:
    """Shape of a bridge for grid x grid patch latents of `latent_width` channels on FLUX text tokens of `text_width`.

    grid_out: side of the grid of FLUX's image tokens. connector, and its width: of `queries` only.
    """

    kind: Literal["queries", "cross_attention"]
    latent_width: int
    text_width: int
    grid: int
    grid_out: int
    connector: Connector | None = None
    width: int = 0

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def tokens(self) -> int:
        """Additional text tokens."""
        return self.connector.queries if self.connector else self.patches

    @property
    def heads(self) -> int:
        """Of the connector's attention."""
        return max(n for n in range(1, max(1, self.width // HEAD) + 1) if self.width % n == 0)

    def require_use(self, transformer: Mapping[str, Any]) -> None:
        """Nothing: FLUX reads every text token."""

    def require(self, transformer: Mapping[str, Any], latent_width: int, grid_in: int, grid_out: int) -> None:
        """RunError unless this bridge fits these latents and this FLUX."""
        fits = (self.latent_width, self.text_width, self.grid, self.grid_out)
        if fits != (latent_width, transformer["joint_attention_dim"], grid_in, grid_out):
            raise RunError(
                f"the bridge expects {self.grid} x {self.grid} patch latents of width {self.latent_width}, text tokens"
                f" of width {self.text_width} and {self.grid_out} x {self.grid_out} image tokens; these models have"
                f" {grid_in} x {grid_in} of {latent_width}, {transformer['joint_attention_dim']} and"
                f" {grid_out} x {grid_out}: use those that it was trained with"
            )


BridgeConfig = ControlNetConfig | TextBridgeConfig
"""The shape of what stage 2 trains."""


def bridge_config(
    settings: ControlNet, transformer: Mapping[str, Any], latent_width: int, grid_in: int, grid_out: int
) -> BridgeConfig:
    """The shape for a FLUX transformer and patch latents [B, grid_in^2, latent_width]; RunError if none fits."""
    if settings.bridge == "latents_2d":
        copied = ControlNetConfig.of(
            transformer, latent_width, grid_in, grid_out, settings.double, settings.single, settings.norm
        )
        return replace(copied, lora=settings.lora) if settings.weights == "lora" else copied
    text_width = transformer["joint_attention_dim"]
    own = settings.bridge, latent_width, text_width, grid_in, grid_out
    if settings.bridge == "cross_attention":
        return TextBridgeConfig(*own)
    width = transformer.get("num_attention_heads", 24) * transformer.get("attention_head_dim", 128)
    return TextBridgeConfig(*own, settings.connector, settings.connector.width or width)
