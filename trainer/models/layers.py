"""The branch's decoder layer: Qwen's mathematics and parameter names, for patches over a constant prefix.

transformers' own layer also rotates tokens at position 0 and saves more for the backward pass; see `elementwise`.

Legend: B images, N patches, D hidden width, C width of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...kernels import prefix_attention
from ...kernels.attention import Backend
from ...recipes.branch import Lora
from .backbone import Prefix, rotated
from .elementwise import GatedDown, RmsNorm
from .linear import Linear
from .low_rank import AdaptedDown, AdaptedLinear

Rotation = tuple[Tensor, Tensor] | None
"""Cosines and sines [B, N, C] of the patches' positions; None if all positions are zero: no rotation."""


class BranchLayer(nn.Module):
    """Decoder layer of a Qwen2_5_VLTextConfig: [B, N, D] -> [B, N, D].

    index: its layer of the prefix. lora: of a layer that shares the text model's weights; see `low_rank`.
    """

    def __init__(self, config: Any, index: int, lora: Lora | None = None) -> None:
        super().__init__()
        # In the order of transformers' layer, from which the weights are copied.
        self.self_attn = PrefixAttention(config, index, lora)
        self.mlp = Mlp(config, lora)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, prefix: Prefix, rotation: Rotation, backend: Backend, recomputed: bool) -> Tensor:
        """recomputed: whether activation checkpointing recomputes the layer in the backward pass."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), prefix, rotation, backend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden), recomputed)


class PrefixAttention(nn.Module):
    """Attention of every patch to the text of its sample and the patches of its image."""

    def __init__(self, config: Any, index: int, lora: Lora | None = None) -> None:
        super().__init__()
        width, self.index = config.hidden_size, index
        self.head_dim = width // config.num_attention_heads
        keys = config.num_key_value_heads * self.head_dim
        self.q_proj = _linear(width, width, True, lora, "q_proj")
        self.k_proj = _linear(width, keys, True, lora, "k_proj")
        self.v_proj = _linear(width, keys, True, lora, "v_proj")
        self.o_proj = _linear(width, width, False, lora, "o_proj")

    def forward(self, hidden: Tensor, prefix: Prefix, rotation: Rotation, backend: Backend) -> Tensor:
        projections = self.q_proj, self.k_proj, self.v_proj
        query, key, value = (project(hidden).unflatten(-1, (-1, self.head_dim)) for project in projections)
        if rotation is not None:
            query, key = rotated(query, *rotation), rotated(key, *rotation)
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        texts, layout = (prefix.keys[self.index], prefix.values[self.index]), prefix.layout
        out = prefix_attention(query, key, value, *texts, layout, self.head_dim**-0.5, backend)
        return self.o_proj(out.reshape(hidden.shape))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Any, lora: Lora | None = None) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = _linear(width, inner, False, lora, "gate_proj")
        self.up_proj = _linear(width, inner, False, lora, "up_proj")
        if lora is None:
            self.down_proj: nn.Module = GatedDown(inner, width, bias=False)
        else:
            self.down_proj = AdaptedDown(inner, width, lora, "down_proj" in lora.targets)

    def forward(self, hidden: Tensor, recomputed: bool = False) -> Tensor:
        return self.down_proj(self.gate_proj(hidden), self.up_proj(hidden), recomputed)


def _linear(inputs: int, outputs: int, bias: bool, lora: Lora | None, name: str) -> nn.Module:
    if lora is None:
        return Linear(inputs, outputs, bias=bias)
    return AdaptedLinear(inputs, outputs, lora, name in lora.targets)
