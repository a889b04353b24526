"""Stage 1 as the public release formulates it: the baseline that `bifrost bench step` measures the routed step against.

Every token, padding included, passes through both sets of weights, and a 0/1 mask selects the result; attention is
eager, with a four-dimensional additive mask; gradients flow through the text rows as well. Plain PyTorch on the weights
of a `PatchLatentModel`, without its code; tests/conformance compares both with the release's numbers.

Legend: B samples, T text tokens with padding, N patches, S = T + N, D hidden width, H query heads, G key heads, C head
width.
"""

from __future__ import annotations

from ..models import libraries  # noqa: F401  # isort: skip

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ...kernels import PatchLatentHead
from ...kernels.bench.attention import dense_attention, sdpa_attention
from ..planner.part import Part
from ..stages.patch_latent_model import PatchLatentModel
from .prompts import Batch
from .routed import Mark

Attention = Literal["eager", "sdpa"]
"""`eager` materialises all scores, like the release; `sdpa` is torch's fused attention with the same mask."""


class DenseStep:
    """The loss of the public formulation, on the weights of `routed`."""

    def __init__(self, routed: PatchLatentModel, attention: Attention = "eager") -> None:
        self.routed = routed
        self.fused = attention == "sdpa"

    def loss(self, latents: Tensor, mask: Tensor, input_ids: Tensor, real: Tensor) -> Tensor:
        """Mean squared error of all patches of latents [B, N, D], masked where mask [B, N] is True.

        input_ids [B, T] are padded on the left, real [B, T] is True where they are not padding.
        """
        text, branch, head = self.routed.backbone.text, self.routed.branch, self.routed.head
        assert isinstance(head, PatchLatentHead)
        hide = mask[..., None].to(latents.dtype)
        image = branch.mask_token.to(latents.dtype) * hide + latents * (1 - hide)
        if branch.positions is not None:
            image = image + branch.positions.to(latents.dtype)
        begin = real.shape[1]
        hidden = torch.cat((F.embedding(input_ids, text.embed_tokens.weight).to(latents.dtype), image), dim=1)
        patches = torch.zeros(*hidden.shape[:2], 1, dtype=hidden.dtype, device=hidden.device)
        patches[:, begin:] = 1
        seen = additive_mask(real, mask.shape[1], hidden.dtype)
        places = (real.long().cumsum(1) - 1).clamp_min(0).expand(3, -1, -1)
        places = torch.cat((places, branch.position_ids(real.sum(1))), dim=2)
        rotation = branch.rotary_embedding(hidden, places)
        for pair in zip(text.layers, branch.layers, strict=True):
            if branch.activation_checkpointing:
                hidden = checkpoint(self._layer, pair, hidden, patches, seen, rotation, use_reentrant=False)
            else:
                hidden = self._layer(pair, hidden, patches, seen, rotation)
        hidden = _norm((text.norm, branch.norm), hidden, patches)[:, begin:]
        return F.mse_loss(F.linear(hidden, head.weight, head.bias).float(), latents.float())

    def step(self, batch: Batch, mark: Mark = lambda name: None) -> Tensor:
        """Loss and all gradients."""
        loss = self.loss(batch.latents, batch.mask, batch.input_ids, batch.real)
        loss.backward()
        mark("step")
        return loss.detach()

    def flops(self, samples: Sequence[Sequence[Part]], text: int) -> float:
        """FLOPs per sample with `text` tokens, padding included. Forward: all S rows through both sets of weights.
        Backward: gradients of the inputs of both and of the trained weights. samples: the routed step's parts."""
        branch, named = self.routed.branch, {part.name: part for part in samples[0]}
        total, head = text + branch.side**2, named["head"]
        layers = named["generation branch"].linear / branch.side**2 * total
        attention = 4.0 * total**2 * branch.config.hidden_size * branch.config.num_hidden_layers
        forward = (2 * layers + attention) * (1 + branch.activation_checkpointing)
        backward = 3 * layers + (2.5 if self.fused else 2.0) * attention
        return forward + backward + head.forward + head.backward

    def _layer(
        self, pair: tuple[Any, Any], hidden: Tensor, patches: Tensor, seen: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        normed = _norm([layer.input_layernorm for layer in pair], hidden, patches)
        hidden = hidden + self._attention([layer.self_attn for layer in pair], normed, patches, seen, rotation)
        normed = _norm([layer.post_attention_layernorm for layer in pair], hidden, patches)
        outs = []
        for layer in pair:
            gate, up = (F.linear(normed, part.weight) for part in (layer.mlp.gate_proj, layer.mlp.up_proj))
            outs.append(F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight))
        return hidden + _blend(outs, patches)

    def _attention(
        self, pair: list[Any], hidden: Tensor, patches: Tensor, seen: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        def projected(name: str, x: Tensor) -> Tensor:
            parts = [getattr(attention, name) for attention in pair]
            return _blend([F.linear(x, part.weight, part.bias) for part in parts], patches)

        query, key, value = (
            projected(name, hidden).unflatten(-1, (-1, pair[0].head_dim)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = apply_rotary_pos_emb(query, key, *rotation)
        attend = sdpa_attention if self.fused else dense_attention
        out = attend(query, key, value, seen, pair[0].scaling)
        return projected("o_proj", out.transpose(1, 2).flatten(2))


def additive_mask(real: Tensor, patches: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, S, S]: causal, padding columns masked, full attention among patches; 0 where attended."""
    samples, text = real.shape
    total = text + patches
    seen = torch.ones(total, total, dtype=torch.bool, device=real.device).tril()
    seen[text:, text:] = True
    columns = torch.cat((real, real.new_ones(samples, patches)), dim=1)
    seen = seen & columns[:, None, None, :]
    return torch.zeros(seen.shape, dtype=dtype, device=real.device).masked_fill(~seen, torch.finfo(dtype).min)


def _blend(outs: list[Tensor], patches: Tensor) -> Tensor:
    """Select the output of the frozen or the trained weights per row by `patches` [B, S, 1]."""
    frozen, trained = outs
    return frozen * (1 - patches) + trained * patches


def _norm(pair: Any, hidden: Tensor, patches: Tensor) -> Tensor:
    """Qwen's RMSNorm with both sets of weights."""

    def normed(norm: Any) -> Tensor:
        exact = hidden.float()
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + pair[0].variance_epsilon)
        return norm.weight * exact.to(hidden.dtype)

    return _blend([normed(norm) for norm in pair], patches)
