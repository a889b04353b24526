"""Kernels: the patch-latent head and loss, and prefix attention. Depends only on torch and Triton."""

from .attention import PrefixLayout, Segments, prefix_attention, segment_attention
from .dense_attention import dense_attention, dense_is_faster
from .gather_norm import gather_rms_norm
from .latent_loss import PatchLatentHead, patch_latent_loss
from .mask_mix import mask_mix

__all__ = [
    "PatchLatentHead",
    "PrefixLayout",
    "Segments",
    "dense_attention",
    "dense_is_faster",
    "gather_rms_norm",
    "mask_mix",
    "patch_latent_loss",
    "prefix_attention",
    "segment_attention",
]
