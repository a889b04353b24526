"""The model of stage 2: frozen vision encoder and FLUX, and the ControlNet or another bridge between them.

Legend: B samples of a micro-batch, K draws of noise per sample, N patch latents of width D, M packed FLUX tokens of C
channels, S and P image sides in pixels for the vision encoder and for FLUX.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..models import flux as flow
from ..models import weights
from ..models.backbone import FrozenBackbone
from ..models.controlnet_config import ControlNetConfig
from ..models.flux import Tokens
from ..models.latent_controlnet import LatentControlNet
from ..models.low_rank import share
from ..models.text_bridge import TextBridge, build_bridge
from . import Losses, StageModel
from .placement import PlacedFlux, build_unsharded, offload, set_unregistered_module

if TYPE_CHECKING:
    from .controlnet import ControlNetStage


class LatentControlNetModel(StageModel):
    """Frozen vision encoder and FLUX, and the ControlNet between them. `load` fills the weights after construction."""

    def __init__(self, stage: ControlNetStage, activation_checkpointing: bool) -> None:
        super().__init__()
        self.guidance = stage.flux.guidance
        self.recomputed = activation_checkpointing
        self.vision_placement = stage.vision_placement
        self.build_vision_encoder: Callable[[], FrozenBackbone] = partial(
            FrozenBackbone, stage.config, vision_attention=stage.kernels.vision, text=False
        )
        if self.vision_placement == "sharded":
            self.backbone = self.build_vision_encoder()
        self.flux = PlacedFlux(stage.folder, stage.where)
        self.controlnet = build_bridge(stage.shape)
        self.share_flux()

    def statistics(self) -> dict[str, Tensor]:
        return {f"controlnet.{name}": buffer for name, buffer in self.controlnet.statistics().items()}

    @property
    def batch_statistics(self) -> bool:
        return bool(self.statistics())

    def load(self, files: weights.WeightFiles, seed: int) -> None:
        """Load frozen parts from their files; initialise the ControlNet as FLUX's copy with zero output projections, or
        draw another bridge."""
        self.build_rest()
        if self.vision_placement != "cached":
            self.backbone.load(files)
        self.flux.load()
        self.offload()
        transformer = self.flux.folder.files("transformer")
        self.controlnet.initialise(transformer, transformer.path, seed)

    def build_rest(self) -> None:
        """Build the frozen parts that are not sharded, without weights, and the rotary tables; enable activation
        checkpointing."""
        like = next(self.controlnet.parameters())
        if self.vision_placement not in ("sharded", "cached"):
            set_unregistered_module(
                self, "backbone", build_unsharded(self.build_vision_encoder, self.vision_placement, like)
            )
        self.flux.build_rest(like)
        self.share_flux()
        if self.vision_placement != "cached":
            self.backbone.restore_rotary()
        if self.recomputed:
            self.flux.transformer.enable_gradient_checkpointing()
            if isinstance(self.controlnet, LatentControlNet):
                self.controlnet.enable_gradient_checkpointing()

    def share_flux(self) -> None:
        """Let the ControlNet use FLUX's weights, with `controlnet.weights: lora`, once FLUX is built."""
        shape = self.controlnet.shape
        if isinstance(shape, ControlNetConfig) and shape.lora and self.flux.transformer is not None:
            share([self.controlnet], [self.flux.transformer])

    def offload(self) -> None:
        """Keep the filled weights of offloaded parts in host memory."""
        device = weights.local_slice(next(self.controlnet.parameters()))[0].device
        self.flux.offload(device)
        if self.vision_placement == "offloaded":
            offload(self.backbone.vision, device)

    def patch_latents(self, images: Tensor) -> Tensor:
        """The vision encoder's latents [B, N, D] of uint8 images [B, 3, S, S], or of another shape."""
        return self.backbone.patch_latents(images)

    def forward(
        self,
        posterior: Tensor,
        noise: Tensor,
        level: Tensor,
        normalizer: float,
        images: Tensor | None = None,
        flux_images: Tensor | None = None,
        t5: Tensor | None = None,
        clip: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        text: Tensor | None = None,
        pooled: Tensor | None = None,
        latents: Tensor | None = None,
        predicted: Tensor | None = None,
        truncated: int = 0,
    ) -> Losses:
        """Losses of images [B, 3, S, S] and the same images at FLUX's size, flux_images [B, 3, P, P], both uint8.

        posterior [B K, c, h, w] and noise [B K, M, C] are standard normal, as is level [B K], the logit of the noise
        level. The draws of a sample, next to each other, share all that does not depend on them.
        normalizer: elements of the mean. t5 [B, L] and clip [B, 77] are token ids. A cache provides latents
        [B, N, D] instead of images, mean and std [B, c, h, w] instead of flux_images, text [B, L, E] and pooled [B, P]
        instead of token ids. predicted: bool [B], samples with these latents although images are given. truncated:
        captions whose end T5 does not read.
        """
        condition = latents if images is None else self.patch_latents(images)
        if predicted is not None:
            assert condition is not None and latents is not None
            condition = torch.where(predicted[:, None, None], latents, condition)
        if flux_images is not None:
            mean, std = self.flux.posterior(flux_images)
        if t5 is not None and clip is not None:
            text, pooled = self.flux.encode_text(Tokens(t5, clip))
        assert condition is not None
        assert mean is not None and std is not None and text is not None and pooled is not None
        samples, patches = condition.shape[:2]
        if (draws := len(level) // samples) > 1:
            mean, std, text, pooled = (x.repeat_interleave(draws, 0) for x in (mean, std, text, pooled))
        clean = flow.pack(self.flux.sample_posterior(mean, std, posterior))
        sigma = flow.sigmas(level)
        height, width = posterior.shape[-2:]
        rest: dict[str, Any] = {
            "text": text,
            "pooled": pooled,
            "timestep": sigma,
            "guidance": self.flux.guidance(self.guidance, len(sigma), sigma.device),
            "img_ids": flow.image_ids(height, width, sigma.device),
            "txt_ids": torch.zeros(text.shape[1], 3, device=sigma.device),
        }
        noisy, residuals = flow.noisy(clean, noise, sigma), None
        if isinstance(self.controlnet, TextBridge):
            rest = self.controlnet.join(rest, condition)
        else:
            residuals = self.controlnet(noisy, condition, **rest, columns=width // 2)
        predicted = flow.velocity(self.flux.transformer, noisy, residuals, **rest)
        error = predicted - flow.target(clean, noise)
        squares = error.square().sum(dim=(1, 2))
        # High-noise loss is dominated by FLUX; low-noise loss is what the ControlNet can improve.
        noisier = (sigma > 0.5).float()
        elements = noise[0].numel()
        tokens = len(sigma) * (noise.shape[1] + rest["text"].shape[1]) + samples * patches
        halves = [((squares.detach() * half).sum(), half.sum() * elements) for half in (1 - noisier, noisier)]
        sums = torch.stack([*halves[0], *halves[1], squares.new_full((), tokens), squares.new_full((), truncated)])
        return Losses(squares.sum() / normalizer, sums, squares.detach().view(samples, -1).sum(1) / normalizer)
