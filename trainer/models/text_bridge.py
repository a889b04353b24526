"""Bridges of stage 2 without a ControlNet, for comparison: patch latents as additional text tokens of the frozen FLUX.

Legend: B samples, N patch latents of width D, Q additional text tokens of width E, L text tokens, W connector width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import weights
from .latent_controlnet import LatentControlNet
from .text_bridge_config import MLP, BridgeConfig, TextBridgeConfig

_STD = 0.02
"""Standard deviation of initial queries and positions, as of the branch's mask token and position table."""


class TextBridge(nn.Module):
    """Additional text tokens from patch latents. `initialise` fills the weights after construction."""

    def __init__(self, shape: TextBridgeConfig) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, latents: Tensor) -> Tensor:
        """Text tokens [B, Q, E] of patch latents [B, N, D]."""
        raise NotImplementedError

    def ids(self, device: torch.device) -> Tensor:
        """FLUX's positions of the tokens, [Q, 3]: those of text, all zero."""
        return torch.zeros(self.shape.tokens, 3, device=device)

    def join(self, rest: dict[str, Any], latents: Tensor) -> dict[str, Any]:
        """FLUX's inputs `rest` with the tokens of the latents behind its text [B, L, E] and txt_ids [L, 3]. Of several
        texts per sample, next to each other, all get the tokens of the sample."""
        tokens = self(latents.to(next(self.parameters()).dtype))
        text, txt_ids = rest["text"], rest["txt_ids"]
        if len(text) > len(tokens):
            tokens = tokens.repeat_interleave(len(text) // len(tokens), 0)
        ids = torch.cat((txt_ids, self.ids(txt_ids.device)))
        return {**rest, "text": torch.cat((text.to(tokens.dtype), tokens), dim=1), "txt_ids": ids}

    def statistics(self) -> dict[str, Tensor]:
        """None: it has no buffers."""
        return {}

    def initialise(self, flux: weights.Source, where: object, seed: int) -> None:
        """Draw the weights: linear layers as torch does, queries and positions from N(0, 0.02). Nothing is FLUX's."""
        parameters = dict(self.named_parameters())
        drawn = {}
        for name, parameter in parameters.items():
            layer = parameters.get(f"{name.rpartition('.')[0]}.weight")
            if layer is None:
                drawn[name] = weights.Distribution(weights.full_shape(parameter), "normal", _STD)
            else:
                bound = weights.full_shape(layer)[1] ** -0.5
                drawn[name] = weights.Distribution(weights.full_shape(parameter), "uniform", bound)
        weights.fill(parameters, weights.RandomInit(seed, drawn), "initial weights")


class ProjectedLatents(TextBridge):
    """Each patch latent as a text token, at the place of its patch among FLUX's image tokens: Q = N."""

    def __init__(self, shape: TextBridgeConfig) -> None:
        super().__init__(shape)
        self.project = nn.Linear(shape.latent_width, shape.text_width)

    def forward(self, latents: Tensor) -> Tensor:
        return self.project(latents)

    def ids(self, device: torch.device) -> Tensor:
        """(0, row, column) of the middle of each patch."""
        scale = self.shape.grid_out / self.shape.grid
        places = (torch.arange(self.shape.grid, device=device) + 0.5) * scale - 0.5
        return F.pad(torch.cartesian_prod(places, places), (1, 0))


class _ConnectorBlock(nn.Module):
    """Attention of the queries to latents and queries, then an MLP; norms before both, without weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        self.up = nn.Linear(width, MLP * width)
        self.down = nn.Linear(MLP * width, width)

    def forward(self, queries: Tensor, latents: Tensor) -> Tensor:
        """queries [B, Q, W], normalised latents [B, N, W]."""
        normed = self.norm(queries)
        context = torch.cat((latents, normed), dim=1)
        rows = (self.to_q(normed), self.to_k(context), self.to_v(context))
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in rows)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        queries = queries + self.to_out(attended)
        return queries + self.down(F.gelu(self.up(self.norm(queries)), approximate="tanh"))


class QueryConnector(TextBridge):
    """Learnable 1-D queries that attend to the patch latents, as in MetaQuery; a table adds each latent's place."""

    def __init__(self, shape: TextBridgeConfig) -> None:
        super().__init__(shape)
        assert shape.connector is not None
        width = shape.width
        self.queries = nn.Parameter(torch.empty(1, shape.tokens, width))
        self.positions = nn.Parameter(torch.empty(1, shape.patches, width))
        self.latents = nn.Linear(shape.latent_width, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.blocks = nn.ModuleList(_ConnectorBlock(width, shape.heads) for _ in range(shape.connector.layers))
        self.project = nn.Linear(width, shape.text_width)

    def forward(self, latents: Tensor) -> Tensor:
        context = self.norm(self.latents(latents) + self.positions)
        queries = self.queries.expand(len(latents), -1, -1)
        for block in self.blocks:
            queries = block(queries, context)
        return self.project(self.norm(queries))


Bridge = LatentControlNet | TextBridge
"""What stage 2 trains."""


def build_bridge(shape: BridgeConfig) -> Bridge:
    """The bridge of this shape, without weights."""
    if not isinstance(shape, TextBridgeConfig):
        return LatentControlNet(shape)
    return QueryConnector(shape) if shape.kind == "queries" else ProjectedLatents(shape)
