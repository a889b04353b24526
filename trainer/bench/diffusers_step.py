"""Stage 2 as diffusers' train_controlnet_flux.py formulates it: the baseline of `bifrost bench step` for a ControlNet.

diffusers' own FluxControlNetModel and FluxTransformer2DModel with torch's linear layers, called in the example's order
and precision: with bf16, the frozen FLUX has bf16 weights, and the ControlNet has fp32 weights and runs under autocast;
its residuals are passed on in bf16. The condition differs: patch latents through our resampler, as in the public
release, instead of the VAE's latents of a condition image.

Legend: B samples, M packed FLUX tokens of C channels.
"""

from __future__ import annotations

from ..models import libraries  # noqa: F401  # isort: skip

import copy
import warnings
from typing import Any

import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.flux import image_ids, pack
from ..models.latent_controlnet import LatentControlNet
from ..models.resampler import on_grid
from ..stages.controlnet_model import LatentControlNetModel
from .controlnet_shapes import Batch
from .routed import Mark


class DiffusersStep(nn.Module):
    """The example's step with the weights of `ours`. FLUX's are the same tensors, the ControlNet's are fp32 copies with
    the same values.

    online: encode the images in every step, by the VAE and the vision encoder of `ours`.
    """

    def __init__(self, ours: LatentControlNetModel, dtype: torch.dtype, online: bool) -> None:
        super().__init__()
        assert isinstance(ours.controlnet, LatentControlNet)
        folder, shape = ours.flux.folder, ours.controlnet.shape
        settings = {name: value for name, value in shape.public().items() if not name.startswith("_")}
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a moved import in diffusers itself
            self.transformer: Any = FluxTransformer2DModel.from_config(folder.transformer)
            self.controlnet: Any = FluxControlNetModel(**settings)
            self.controlnet.controlnet_x_embedder = nn.Linear(shape.latent_width, self.controlnet.inner_dim)
        added = [name for name, _ in ours.controlnet.named_children() if not hasattr(self.controlnet, name)]
        self.resampler = added[0] if added else None
        if self.resampler:
            self.controlnet.add_module(self.resampler, copy.deepcopy(getattr(ours.controlnet, self.resampler)))
        self.transformer.load_state_dict(ours.flux.transformer.state_dict(), assign=True)
        self.transformer.requires_grad_(False)
        weights = ours.controlnet.state_dict().items()
        own = {n: x.to(torch.float32, copy=True) if x.is_floating_point() else x.clone() for n, x in weights}
        self.controlnet.load_state_dict(own, assign=True)
        if ours.recomputed:
            self.transformer.enable_gradient_checkpointing()
            self.controlnet.enable_gradient_checkpointing()
        self.dtype, self.guidance = dtype, ours.guidance if folder.guided else None
        self.shift, self.scale = folder.vae.get("shift_factor") or 0.0, folder.vae.get("scaling_factor", 0.18215)
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler()
        self.encoders = [ours] if online else []  # in a list: no part of this module

    @property
    def copied_bytes(self) -> int:
        """Bytes of the copies of the ControlNet's weights that autocast makes and keeps for the backward pass, at
        most."""
        count = sum(parameter.numel() for parameter in self.controlnet.parameters())
        return self.dtype.itemsize * count if self.dtype == torch.bfloat16 else 0

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name in `ours` -> parameter."""
        return {f"controlnet.{name}": parameter for name, parameter in self.controlnet.named_parameters()}

    def step(self, batch: Batch, mark: Mark = lambda name: None) -> Tensor:
        """Loss and all gradients."""
        latents, mean, std = batch.latents, batch.mean, batch.std
        for ours in self.encoders:
            mean, std = ours.flux.posterior(batch.flux_images)
            latents = ours.backbone.patch_latents(batch.images)
            mark("encoders")
        loss = self.loss(batch, latents, mean, std)
        mark("forward")
        loss.backward()
        mark("backward")
        return loss.detach()

    def loss(self, batch: Batch, latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Mean squared error of the velocity; latents [B, N, D], mean and std [B, c, h, w] of the VAE's posterior."""
        dtype, (height, width) = self.dtype, mean.shape[-2:]
        sampled = mean.to(dtype) + std.to(dtype) * batch.posterior.to(dtype)
        clean, noise = pack((sampled - self.shift) * self.scale), batch.noise.to(dtype)
        indices = (batch.level.sigmoid() * self.scheduler.config["num_train_timesteps"]).long()
        timesteps = self.scheduler.timesteps.to(indices.device)[indices]
        sigmas = self.sigmas(timesteps, dtype)
        noisy = (1 - sigmas) * clean + sigmas * noise
        shared = {
            "hidden_states": noisy,
            "timestep": timesteps / 1000,
            "guidance": None if self.guidance is None else noisy.new_full((len(noisy),), self.guidance),
            "pooled_projections": batch.pooled.to(dtype),
            "encoder_hidden_states": batch.text.to(dtype),
            "txt_ids": torch.zeros(batch.text.shape[1], 3, device=noisy.device),
            "img_ids": image_ids(height, width, noisy.device),
            "return_dict": False,
        }
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            double, single = self.controlnet(controlnet_cond=self.condition(latents.to(dtype)), **shared)
        predicted = self.transformer(
            controlnet_block_samples=None if double is None else [x.to(dtype) for x in double],
            controlnet_single_block_samples=None if single is None else [x.to(dtype) for x in single],
            **shared,
        )[0]
        return F.mse_loss(predicted.float(), (noise - clean).float())

    def condition(self, latents: Tensor) -> Tensor:
        """Patch latents [B, N, D] on FLUX's token grid, [B, M, D]."""
        return on_grid(getattr(self.controlnet, self.resampler), latents) if self.resampler else latents

    def sigmas(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Noise levels [B, 1, 1] of timesteps [B], each looked up in the scheduler's table as in the example."""
        table = self.scheduler.timesteps.to(timesteps.device)
        found = [int((table == step).nonzero()) for step in timesteps]
        return self.scheduler.sigmas.to(timesteps.device, dtype)[found].view(-1, 1, 1)
