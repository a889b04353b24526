"""Attention over few keys on a CPU in 16 bits, where torch's own is slow: as batched matrix products.

Scores and softmax are in fp32, as in torch's flash attention, and equally exact; probabilities are kept in 16 bits for
the backward pass. With 112 keys, forward and backward take a third of the time of torch's math backend and of its
flash attention, whose backward pass is slow there.

Legend: B samples, R rows, K keys, H query heads, G key heads (H a multiple of G), C head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_KEYS = 512
"""Above, the gain is small, and the probabilities would be most of what a layer keeps."""


def dense_is_faster(keys: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `dense_attention` is the way to attend to up to `keys` keys."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and keys <= MOST_KEYS


class _Dense(torch.autograd.Function):
    """See `dense_attention`. Saves query, key and value as they are given, and the probabilities [B G, H / G R, K]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Tensor | None) -> Tensor:
        groups = key.shape[2]
        rows, columns = _grouped(query, groups), _by_head(key)
        scores = torch.bmm(rows.float().mul_(scale), columns.float().transpose(1, 2))
        if seen is not None:
            each = scores.view(len(query), groups, -1, query.shape[1], key.shape[1])
            each.masked_fill_(~seen[:, None, None], -torch.inf)
        weights = torch.softmax(scores, -1).to(query.dtype)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, weights)
        return _ungrouped(torch.bmm(weights, _by_head(value)), query)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        groups = key.shape[2]
        rows = _grouped(gradient, groups)
        d_value = torch.bmm(weights.transpose(1, 2), rows)
        d_weights = torch.bmm(rows, _by_head(value).transpose(1, 2))
        # In fp32 inside, one pass over the scores.
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        d_query = torch.bmm(d_scores, _by_head(key))
        d_key = torch.bmm(d_scores.transpose(1, 2), _grouped(query, groups))
        d_keys, d_values = (x.unflatten(0, (-1, groups)).transpose(1, 2) for x in (d_key, d_value))
        return _ungrouped(d_query, query), d_keys, d_values, None, None


def _by_head(x: Tensor) -> Tensor:
    """[B, K, G, C] -> [B G, K, C]."""
    return x.transpose(1, 2).flatten(0, 1)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, R, H, C] -> [B G, H / G R, C]: the rows of all query heads of a key head."""
    return x.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)


def _ungrouped(x: Tensor, like: Tensor) -> Tensor:
    """The opposite of `_grouped`, for `like` [B, R, H, C]."""
    batch, rows, heads, _ = like.shape
    return x.reshape(batch, heads, rows, -1).transpose(1, 2)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Tensor | None = None) -> Tensor:
    """Attention of query [B, R, H, C] to key and value [B, K, G, C] of the same sample: [B, R, H, C].

    seen: the keys that a row attends to, bool [B, R, K] or [B, 1, K]; default all. A row must see a key.
    """
    return _Dense.apply(query, key, value, scale, seen)  # type: ignore[return-value]
