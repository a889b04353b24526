"""What a plan counts: the configs of a recipe's models, opened and checked. No weights or tokenizers are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...recipes.data import Buckets
from ...recipes.schema import Backbone, Branch, ControlNet, Data, Flux
from ...recipes.stage2 import Latents
from ..models.backbone_config import branch_layers, grid_side, read_shape, require_same_grid, require_targets
from ..models.flux_config import FluxConfig
from ..models.hub import architecture
from ..models.image_grids import ImageGrid, every_grid, square_grid
from ..models.text_bridge_config import BridgeConfig, bridge_config


@dataclass(frozen=True)
class PatchLatents:
    """Stage 1. config: a `BackboneConfig`, or a Qwen2_5_VLConfig; image_size: of a square image, in pixels."""

    config: Any
    backbone: Backbone
    branch: Branch
    image_size: int
    seed: int
    flux: Flux | None = None
    vae: FluxConfig | None = None
    """The FLUX whose VAE makes the targets, with `branch.targets: vae`."""
    encoder: Any = None
    """The config of the model whose vision encoder makes the targets, with `branch.targets: encoder`."""
    buckets: Buckets | None = None
    edited: float = 0.0
    """The share of the samples that are editing pairs."""
    texts: bool = False
    """Whether the base's own loss is measured on understanding sources."""

    @property
    def square(self) -> ImageGrid:
        """The grid of a square image; see `ImageGrid`."""
        side = grid_side(self.config, self.image_size)
        return square_grid(side, side)

    @property
    def grids(self) -> tuple[ImageGrid, ...]:
        """As of `LatentControl`."""
        return every_grid(self.buckets, self.image_size, self.square)

    @classmethod
    def open(cls, backbone: Backbone, branch: Branch, data: Data, seed: int, flux: Flux | None = None) -> PatchLatents:
        """RunError names what cannot be used."""
        image_size = data.image_size
        config = read_shape(architecture(backbone.path, backbone.revision))
        side = grid_side(config, image_size)
        branch_layers(config, branch.layers)
        require_targets(config, branch.targets, image_size)
        if branch.targets == "encoder":
            assert branch.encoder is not None, "required by the recipe schema"
            encoder = read_shape(architecture(branch.encoder, setting="branch.encoder"))
            require_same_grid(encoder, image_size, side)
            return cls(config, backbone, branch, image_size, seed, encoder=encoder)
        every_grid(data.buckets, image_size, square_grid(side, side))  # refuses buckets of one shape
        if branch.targets != "vae":
            return cls(config, backbone, branch, image_size, seed, buckets=data.buckets)
        assert flux is not None, "required by the recipe schema"
        vae = FluxConfig.open(architecture(flux.path, flux.revision, "flux.path"))
        vae.values_of_patch(flux.image_size, side)  # refuses sizes that do not fit
        return cls(config, backbone, branch, image_size, seed, flux, vae)


@dataclass(frozen=True)
class LatentControl:
    """Stage 2. config: of the vision encoder, as in `PatchLatents`. grids: of the images, one per bucket; of the square
    alone without buckets."""

    config: Any
    flux: Flux
    folder: FluxConfig
    shape: BridgeConfig
    latents: Latents
    square: ImageGrid
    grids: tuple[ImageGrid, ...]

    @classmethod
    def open(cls, backbone: Backbone, flux: Flux, controlnet: ControlNet, data: Data) -> LatentControl:
        """RunError names what cannot be used."""
        image_size = data.image_size
        config = read_shape(architecture(backbone.path, backbone.revision))
        folder = FluxConfig.open(architecture(flux.path, flux.revision, "flux.path"), flux.weights, flux.text_tokens)
        sizes = config.vision_config.out_hidden_size, grid_side(config, image_size), folder.grid(flux.image_size)
        shape = bridge_config(controlnet, folder.transformer, *sizes)
        square = square_grid(*sizes[1:])
        grids = every_grid(data.buckets, image_size, square)
        return cls(config, flux, folder, shape, controlnet.latents, square, grids)
