"""Stage 2's models at a smaller scale, with random weights, and a random batch for them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...recipes.stage2 import Placement
from ..errors import RunError
from ..models.backbone_config import grid_side
from ..models.controlnet_config import ControlNetConfig, residuals_added
from ..models.flux import FluxFolder
from ..models.latent_controlnet import LatentControlNet
from ..models.text_bridge_config import TextBridgeConfig
from ..planner.flux_shapes import hidden_width
from ..stages.controlnet import ControlNetStage
from ..stages.controlnet_model import LatentControlNetModel
from .shapes import built, draw_weights, scaled


@dataclass
class Batch:
    """One micro-batch, with the outputs of the frozen encoders as their caches would provide them.

    B samples: images [B, 3, S, S] and flux_images [B, 3, P, P], uint8; latents [B, N, D]; mean, std and posterior
    [B, c, h, w]; text [B, L, E]; pooled [B, P]; noise [B, M, C]; level [B].
    """

    images: Tensor
    flux_images: Tensor
    latents: Tensor
    mean: Tensor
    std: Tensor
    text: Tensor
    pooled: Tensor
    posterior: Tensor
    noise: Tensor
    level: Tensor


def scaled_stage(stage: ControlNetStage, layers: int | None, width: int | None) -> ControlNetStage:
    """A copy of the stage with `layers` double blocks and this hidden width; None keeps FLUX's own.

    In proportion: single blocks and the ControlNet's blocks to `layers`; widths of text states, patch latents and VAE
    to `width`; the vision encoder to both. Heads keep their width. RunError unless both fit this FLUX.
    """
    control = control_shape(stage)
    own, config = stage.folder.transformer, stage.config
    blocks, head, full = stage.folder.blocks[0], own["attention_head_dim"], hidden_width(own)
    layers, width = layers or blocks, width or full
    if layers > blocks:
        raise RunError(f"--layers {layers}: this FLUX has {blocks} double blocks")
    if width < head or width % head or width > full:
        raise RunError(f"--width {width}: give a multiple of {head}, the width of a head, up to {full}")
    depth, share = layers / blocks, width / full
    singles: int = max(1, round(depth * own["num_single_layers"])) if own["num_single_layers"] else 0
    transformer = {**own, "num_layers": layers, "num_single_layers": singles, "num_attention_heads": width // head}
    vae = dict(stage.folder.vae)
    if width != full:
        for name in ("joint_attention_dim", "pooled_projection_dim"):
            transformer[name] = _multiple(share * own[name], 64)
        groups = vae.get("norm_num_groups", 32)
        vae["block_out_channels"] = [_multiple(share * each, groups) for each in vae["block_out_channels"]]
    text = config.text_config
    if (layers, width) != (blocks, full):
        unit = text.hidden_size // text.num_attention_heads
        config = scaled(
            config, max(1, round(depth * text.num_hidden_layers)), _multiple(share * text.hidden_size, unit)
        )
    folder: FluxFolder = replace(stage.folder, transformer=transformer, vae=vae)
    shape = ControlNetConfig.of(
        transformer,
        config.vision_config.out_hidden_size,
        grid_side(config, stage.data.image_size),
        folder.grid(stage.flux.image_size),
        _copied(depth * control.double, layers),
        _copied(depth * control.single, singles),
        control.norm,
    )
    return replace(stage, config=config, folder=folder, shape=shape)


def control_shape(stage: ControlNetStage) -> ControlNetConfig:
    """The shape of the stage's ControlNet; RunError if it has another bridge, or low-rank pairs."""
    if isinstance(stage.shape, TextBridgeConfig):
        raise RunError(f"controlnet.bridge={stage.shape.kind}: benchmarks measure a ControlNet; leave it out")
    if stage.shape.lora:
        raise RunError("controlnet.weights=lora: benchmarks measure a copy of FLUX's blocks; leave it out")
    return stage.shape


def _multiple(value: float, unit: int) -> int:
    return unit * max(1, round(value / unit))


def _copied(wanted: float, blocks: int) -> int:
    """The number of a ControlNet's blocks next below `wanted` whose residuals a FLUX of `blocks` blocks adds; at least
    one, unless none is wanted."""
    if not wanted:
        return 0
    return next(n for n in range(max(1, round(wanted)), 0, -1) if residuals_added(n, blocks) == n)


def random_model(
    stage: ControlNetStage, encoders: bool, recomputed: bool, device: torch.device, dtype: torch.dtype
) -> LatentControlNetModel:
    """The stage's model with random weights. encoders: with the VAE and the vision encoder, which are otherwise cached
    like the text encoders. recomputed: with activation checkpointing."""
    place = "sharded" if encoders else "cached"  # on one rank: a part of the model, or none
    placement = Placement(vae=place, text="cached", vision_encoder=place)
    flux = stage.flux.model_copy(update={"placement": placement})
    control = stage.controlnet.model_copy(update={"latents": "true"})
    placed = replace(stage, flux=flux, controlnet=control, for_counting=False, previews=False)
    model = built(lambda: placed.build(recomputed), device, dtype)
    if encoders:
        model.backbone.restore_rotary()
    draw_weights(model, device)
    if recomputed:
        model.flux.transformer.enable_gradient_checkpointing()
        assert isinstance(model.controlnet, LatentControlNet)
        model.controlnet.enable_gradient_checkpointing()
    return model


def draw_batch(
    stage: ControlNetStage, model: LatentControlNetModel, samples: int, text_tokens: int, dtype: torch.dtype
) -> Batch:
    """Random images, text states and noise. Latents are the encoders' if the model has them, otherwise random."""
    device = next(model.controlnet.parameters()).device
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(samples, *shape, generator=draw, device=device)

    def pixels(side: int) -> Tensor:
        return torch.randint(0, 256, (samples, 3, side, side), generator=draw, device=device, dtype=torch.uint8)

    transformer, shape = stage.folder.transformer, stage.shape
    channels, height, width = stage.latents
    images, flux_images = pixels(stage.data.image_size), pixels(stage.flux.image_size)
    if hasattr(model, "backbone"):
        latents = model.backbone.patch_latents(images)
        mean, std = model.flux.posterior(flux_images)
    else:
        latents = normal(grid_side(stage.config, stage.data.image_size) ** 2, shape.latent_width).to(dtype)
        mean, std = normal(channels, height, width).to(dtype), normal(channels, height, width).exp().to(dtype)
    return Batch(
        images=images,
        flux_images=flux_images,
        latents=latents,
        mean=mean,
        std=std,
        text=normal(text_tokens, transformer["joint_attention_dim"]).to(dtype),
        pooled=normal(transformer["pooled_projection_dim"]).to(dtype),
        posterior=normal(channels, height, width),
        noise=normal(height * width // 4, 4 * channels),
        level=normal(),
    )
