"""The visual generation branch: a trainable copy of the text model's layers that predicts masked patch latents.

Legend: B samples, N patches (side x side), T text tokens, D hidden width, which is also the latents' width.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.initialization import no_init_weights
from transformers.modeling_utils import AttentionInterface
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLRotaryEmbedding,
)

from ...kernels import prefix_attention
from .backbone import Prefix

PREFIX_ATTENTION = "bifrost_prefix"
INIT_STD = 0.02
"""Standard deviation of mask token and position table at the start (MAR). Zeros, as in the public release, would enter
RMSNorm at its steepest point and multiply their first gradients by about a thousand."""


class GenerationBranch(nn.Module):
    """Decoder layers, final norm, mask token and position table; `PatchLatentModel.load` sets their weights.

    config: the text model's Qwen2_5_VLTextConfig. side: patches along one side of the image.
    """

    def __init__(
        self,
        config: Any,
        side: int,
        positions: Literal["learned", "mrope"],
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.side = side
        self.rotary = positions == "mrope"
        self.activation_checkpointing = activation_checkpointing
        self.config = copy.deepcopy(config)
        self.config._attn_implementation = PREFIX_ATTENTION
        width = config.hidden_size
        with no_init_weights():
            layers = [Qwen2_5_VLDecoderLayer(self.config, i) for i in range(config.num_hidden_layers)]
            self.layers = nn.ModuleList(layers)
            self.norm = Qwen2_5_VLRMSNorm(width, eps=config.rms_norm_eps)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        if positions == "learned":
            self.positions = nn.Parameter(torch.empty(1, side * side, width))
        else:
            self.register_parameter("positions", None)
        self.restore_rotary()

    def restore_rotary(self) -> None:
        """See `FrozenBackbone.restore_rotary`."""
        self.rotary_embedding = Qwen2_5_VLRotaryEmbedding(self.config)

    def position_ids(self, lengths: Tensor) -> Tensor:
        """Rotary positions (t, h, w) of the patches, [3, B, N], after `lengths` [B] text tokens.

        `learned`: all zero, no rotation. `mrope`: Qwen's own, t = n, h = n + row, w = n + column.
        """
        patches = self.side * self.side
        if not self.rotary:
            return lengths.new_zeros(3, len(lengths), patches)
        index = torch.arange(patches, device=lengths.device)
        offsets = torch.stack((torch.zeros_like(index), index // self.side, index % self.side))
        return offsets[:, None, :] + lengths[None, :, None]

    def inputs(self, latents: Tensor, mask: Tensor) -> Tensor:
        """Latents [B, N, D] with the mask token where mask [B, N] is True, plus the position table."""
        mixed = torch.where(mask[..., None], self.mask_token.to(latents.dtype), latents)
        return mixed if self.positions is None else mixed + self.positions.to(latents.dtype)

    def forward(self, latents: Tensor, mask: Tensor, prefix: Prefix) -> Tensor:
        """Hidden states [B, N, D] after the final norm, for `latents` [B, N, D] hidden where `mask` [B, N] is True."""
        hidden = self.inputs(latents, mask)
        rotation = self.rotary_embedding(hidden, self.position_ids(prefix.lengths))
        visible = torch.cat((prefix.mask, torch.ones_like(mask)), dim=1)
        for layer in self.layers:
            settings = {"attention_mask": visible, "past_key_values": prefix, "position_embeddings": rotation}
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, use_reentrant=False, **settings)
            else:
                hidden = layer(hidden, **settings)
        return self.norm(hidden)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: object
) -> tuple[Tensor, None]:
    return prefix_attention(query, key, value, attention_mask, scaling).transpose(1, 2), None


AttentionInterface.register(PREFIX_ATTENTION, _attention)
