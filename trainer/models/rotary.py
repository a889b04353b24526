"""Rotary embedding of patches whose rows and columns share the frequencies."""

from __future__ import annotations

from . import libraries  # noqa: F401  # isort: skip

from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding


class InterleavedRotaryEmbedding(Qwen2_5_VLRotaryEmbedding):
    """Rows turn every second pair of a head, columns the others, so that both have fast and slow ones.

    Qwen2.5-VL gives the slowest 24 of 64 pairs to columns: from one to the next they turn by at most 1.8e-4 radians.
    Text has equal positions on all axes, so the frozen keys of the prefix are the same in either order.
    """

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, N, C], in the dtype of x, of position_ids [3, B, N]."""
        inverse: Any = self.inv_freq
        angles = position_ids[1:, :, :, None].float() * inverse.to(x.device, torch.float)  # [2, B, N, C / 2]
        angles = torch.stack((angles[0, ..., ::2], angles[1, ..., 1::2]), dim=-1).flatten(-2)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)
