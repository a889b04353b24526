"""Kernels: the patch-latent head and loss, and prefix attention. Needs torch (and Triton) alone."""

from .attention import prefix_attention
from .latent_loss import PatchLatentHead, patch_latent_loss

__all__ = ["PatchLatentHead", "patch_latent_loss", "prefix_attention"]
