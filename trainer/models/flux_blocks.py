"""FLUX's blocks with diffusers' parameters and results, which save about half as much for the backward pass.

A frozen double block keeps 10 values per token and unit of width, a single block 9: its input, queries, keys, values,
the attention's output and the MLP before its GELU, and the double block also its state between attention and MLP.
diffusers' blocks keep 14 and 13 with torch's linear layers. Norms, modulation, rotation and GELU are computed again in
the backward pass; matrix products are not. A trained block keeps in addition what its weights' gradients need.

diffusers builds the blocks; `use_own_blocks` turns them into these.

Legend: B samples, L text tokens, M image tokens, S = L + M, H hidden width, h heads of width C, F width of the MLP.
"""

from __future__ import annotations

from . import libraries  # noqa: F401  # isort: skip

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from .eight_bits import scale_of
from .flux_functions import HeadRows, add_residual, attention, gated_sum, gelu_linear, modulated_norm, rotated_norm
from .linear import use_own_linear


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the heads [B, S, h, C], then rotation; see `rotated_norm`."""

    def forward(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return rotated_norm(x, self.weight, rotation)


class GeluLinear(nn.Linear):
    """The MLP's second layer with the GELU before it, [B, S, F] -> [B, S, H]; a single block's also takes the output of
    the attention [B, S, H], whose columns come first."""

    def forward(self, mlp: Tensor, attended: Tensor | None = None, recomputed: bool = False) -> Tensor:  # type: ignore[override]
        return gelu_linear(mlp, attended, self.weight, self.bias, recomputed, scale_of(self))


class JointAttention(FluxAttention):
    """Queries, keys and values of all streams, and their attention."""

    def rows(self, projection: nn.Module, norm: nn.Module, hidden: Tensor, rotation: Tensor) -> HeadRows:
        """Queries or keys of hidden [B, S, H]."""
        raw = self.heads_of(projection(hidden))
        rotated, weight = norm(raw, rotation)
        return HeadRows(rotated, raw, weight, rotation)

    def heads_of(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class DoubleAttention(JointAttention):
    def forward(  # type: ignore[override]
        self, text: Tensor, image: Tensor, rotation: Tensor, recomputed: bool
    ) -> tuple[Tensor, Tensor]:
        """text [B, L, H], image [B, M, H], rotation [S, C / 2] -> the same shapes, projected."""
        lengths = [text.shape[1], image.shape[1]]
        of_text, of_image = rotation.split(lengths)
        query = (
            self.rows(self.add_q_proj, self.norm_added_q, text, of_text),
            self.rows(self.to_q, self.norm_q, image, of_image),
        )
        key = (
            self.rows(self.add_k_proj, self.norm_added_k, text, of_text),
            self.rows(self.to_k, self.norm_k, image, of_image),
        )
        value = torch.cat((self.heads_of(self.add_v_proj(text)), self.heads_of(self.to_v(image))), dim=1)
        text, image = attention(query, key, value, recomputed).flatten(2).split(lengths, dim=1)
        return self.to_add_out(text), self.to_out[0](image)


class SingleAttention(JointAttention):
    def forward(self, queries: Tensor, hidden: Tensor, rotation: Tensor, recomputed: bool) -> Tensor:  # type: ignore[override]
        """hidden [B, S, H], rotation [S, C / 2]; queries: hidden, or its last rows -> attention [B, rows, H]."""
        query = self.rows(self.to_q, self.norm_q, queries, rotation[-queries.shape[1] :])
        key = self.rows(self.to_k, self.norm_k, hidden, rotation)
        return attention((query,), (key,), self.heads_of(self.to_v(hidden)), recomputed).flatten(2)


class DoubleBlock(FluxTransformerBlock):
    """Attention over text and image together, with weights and an MLP for each."""

    def forward(  # type: ignore[override]
        self,
        text: Tensor,
        image: Tensor,
        condition: Tensor,
        rotation: Tensor,
        residual: Tensor | None = None,
        recomputed: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """text [B, L, H], image [B, M, H], condition [B, H] after its SiLU, rotation [S, C / 2] -> both streams.

        residual [B, M, H] is added to the image at the end.
        recomputed: whether activation checkpointing recomputes the block in the backward pass.
        """
        of_text, of_image = self.norm1_context.linear(condition).chunk(6, 1), self.norm1.linear(condition).chunk(6, 1)
        attended = self.attn(
            modulated_norm(text, of_text[1], of_text[0]),
            modulated_norm(image, of_image[1], of_image[0]),
            rotation,
            recomputed,
        )
        streams = (text, attended[0], of_text, self.ff_context), (image, attended[1], of_image, self.ff)
        text, image = (self._mlp(*stream, recomputed) for stream in streams)
        return text, image if residual is None else add_residual(image, residual)

    def _mlp(
        self, hidden: Tensor, attended: Tensor, modulation: tuple[Tensor, ...], layers: Any, recomputed: bool
    ) -> Tensor:
        _, _, gate, shift, scale, gate_mlp = modulation
        hidden = _gated(hidden, gate, attended)
        mlp = layers.net[0].proj(modulated_norm(hidden, scale, shift))
        return _gated(hidden, gate_mlp, layers.net[2](mlp, recomputed=recomputed))


class SingleBlock(FluxSingleTransformerBlock):
    """Attention and MLP side by side, over text and image as one sequence."""

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        condition: Tensor,
        rotation: Tensor,
        residual: Tensor | None = None,
        recomputed: bool = False,
        image: int | None = None,
    ) -> Tensor:
        """hidden [B, S, H], condition [B, H] after its SiLU, rotation [S, C / 2] -> [B, S, H].

        residual [B, M, H] is added to the image tokens at the end.
        image: return only this many tokens at the end, [B, image, H]: of the others, only keys and values are computed.
        recomputed: whether activation checkpointing recomputes the block in the backward pass.
        """
        shift, scale, gate = self.norm.linear(condition).chunk(3, 1)
        normed = modulated_norm(hidden, scale, shift)
        rows = normed
        if image is not None:
            rest = hidden.shape[1] - image
            rows, hidden = (x.split((rest, image), dim=1)[1] for x in (normed, hidden))
        mlp = self.proj_mlp(rows)
        change = self.proj_out(mlp, self.attn(rows, normed, rotation, recomputed), recomputed)
        hidden = _gated(hidden, gate, change)
        return hidden if residual is None else add_residual(hidden, residual)


def _gated(hidden: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    """hidden + gate change, for gate [B, H]."""
    return gated_sum(hidden, gate.unsqueeze(1), change)


def use_own_blocks(model: Any) -> None:
    """Turn the blocks and linear layers of a diffusers FLUX or ControlNet into ours; parameters and names stay."""
    use_own_linear(model)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        attn = block.attn
        for norm in (attn.norm_q, attn.norm_k, *(getattr(attn, n) for n in _ADDED if hasattr(attn, n))):
            norm.__class__ = HeadNorm
    for block in model.transformer_blocks:
        block.__class__, block.attn.__class__ = DoubleBlock, DoubleAttention
        block.ff.net[2].__class__ = block.ff_context.net[2].__class__ = GeluLinear
    for block in model.single_transformer_blocks:
        block.__class__, block.attn.__class__ = SingleBlock, SingleAttention
        block.proj_out.__class__ = GeluLinear


_ADDED = ("norm_added_q", "norm_added_k")
