"""Attention of image tokens over a text prefix and over each other."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Every image query sees the real text tokens and all image tokens of its sample.

    query [B, H, N, C]; key, value [B, G, T + N, C] with H a multiple of G (grouped queries); visible: boolean
    [B, T + N], False where a text slot is padding, or None when nothing is padded. Returns [B, H, N, C].
    """
    mask = None if visible is None else visible[:, None, None, :]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
