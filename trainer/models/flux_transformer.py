"""FLUX's transformer from diffusers, run through our own blocks; see `flux_blocks`.

Legend: B samples, L text tokens of width E, M image tokens of C channels, P pooled text width, H hidden width.
"""

from __future__ import annotations

from . import libraries  # noqa: F401  # isort: skip

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...recipes.fields import HeldWeights
from .eight_bits import eight_bit_linears
from .flux_blocks import use_own_blocks
from .flux_functions import modulated_norm


class Embedded(NamedTuple):
    """The inputs of the blocks: text [B, L, H], image [B, M, H], condition [B, H] of noise level, guidance and pooled
    text after its SiLU, rotation [L + M, head width / 2], complex."""

    text: Tensor
    image: Tensor
    condition: Tensor
    rotation: Tensor


def embed(
    model: Any,
    image: Tensor,
    text: Tensor,
    pooled: Tensor,
    timestep: Tensor,
    guidance: Tensor | None,
    img_ids: Tensor,
    txt_ids: Tensor,
) -> Embedded:
    """Embed the inputs of a FLUX or of its ControlNet: image and text by its own layers, pooled [B, P], timestep and
    guidance [B] in units of 1 / 1000, img_ids [M, 3], txt_ids [L, 3]."""
    levels = [level.to(image.dtype) * 1000 for level in (timestep, guidance) if level is not None]
    condition = F.silu(model.time_text_embed(*levels, pooled))
    cos, sin = model.pos_embed(torch.cat((txt_ids, img_ids)))  # every value twice
    return Embedded(model.context_embedder(text), image, condition, torch.complex(cos[:, ::2], sin[:, ::2]))


def run_block(model: Any, block: Any, *inputs: Any, **settings: Any) -> Any:
    """Run a block, recomputed in the backward pass if the model's gradient checkpointing is on and gradients pass
    through the block: its first two inputs are its state, or state and condition."""
    if model.gradient_checkpointing and torch.is_grad_enabled() and any(x.requires_grad for x in inputs[:2]):
        settings = {**settings, "use_reentrant": False, "preserve_rng_state": False}  # blocks draw nothing
        return checkpoint(block, *inputs, recomputed=True, **settings)
    return block(*inputs, **settings)


class FluxTransformer(FluxTransformer2DModel):
    """diffusers' model with the same parameters and results; made by `build`."""

    @classmethod
    def build(cls, config: Mapping[str, Any], weights: HeldWeights = "bf16") -> FluxTransformer:
        """A model without weights for the `config.json` of a FLUX transformer.

        weights: for 8 bits, how the linear layers of the blocks hold theirs. Embeddings, norms and the output layers
        are not quantized: 0.5 % of FLUX.1's weights.
        """
        if weights == "bf16":
            model: Any = cls.from_config(dict(config))
        else:
            model = cls.from_config({**config, "num_layers": 0, "num_single_layers": 0})
            with eight_bit_linears(weights):
                model.add_blocks(config["num_layers"], config["num_single_layers"])
        use_own_blocks(model)
        return model

    def add_blocks(self, double: int, single: int) -> None:
        """Build the blocks of a model that has none."""
        config: Any = self.config
        widths = self.inner_dim, config.num_attention_heads, config.attention_head_dim
        self.transformer_blocks.extend(FluxTransformerBlock(*widths) for _ in range(double))
        self.single_transformer_blocks.extend(FluxSingleTransformerBlock(*widths) for _ in range(single))
        self.register_to_config(num_layers=double, num_single_layers=single)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        img_ids: Tensor,
        txt_ids: Tensor,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        controlnet_single_block_samples: Sequence[Tensor] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Velocity [B, M, C], as in diffusers: see `flux.velocity`."""
        assert not return_dict
        text, image, condition, rotation = embed(
            self,
            self.x_embedder(hidden_states),
            encoder_hidden_states,
            pooled_projections,
            timestep,
            guidance,
            img_ids,
            txt_ids,
        )
        doubles: Any = self.transformer_blocks
        for block, residual in zip(doubles, _spread(controlnet_block_samples, len(doubles)), strict=True):
            text, image = run_block(self, block, text, image, condition, rotation, residual)
        hidden, tokens = torch.cat((text, image), dim=1), image.shape[1]
        singles: Any = self.single_transformer_blocks
        for block, residual in zip(singles, _spread(controlnet_single_block_samples, len(singles)), strict=True):
            last = {"image": tokens} if block is singles[-1] else {}
            hidden = run_block(self, block, hidden, condition, rotation, residual, **last)
        hidden = hidden if singles else image
        scale, shift = self.norm_out.linear(condition).chunk(2, 1)
        return (self.proj_out(modulated_norm(hidden, scale, shift)),)


def _spread(residuals: Sequence[Tensor] | None, blocks: int) -> list[Tensor | None]:
    """The residual after each block: number i // ceil(blocks / n) of n after block i."""
    if not residuals:
        return [None] * blocks
    step = math.ceil(blocks / len(residuals))
    return [residuals[i // step] for i in range(blocks)]
